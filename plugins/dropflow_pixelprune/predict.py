"""Units that their neighbours do not predict stay, all others never enter the vision tower (PixelPrune)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from dropflow_pixelprune.pixels import PixelOptions, PixelStage

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class PredictOptions(PixelOptions):
    """Options of `pixelprune/predict`."""

    order: Literal["pred_2d", "serpentine", "raster"] = Field(
        default="pred_2d",
        description="which neighbour predicts a unit: the left or the upper one, along the edge that passes through "
        "(`pred_2d`); the one before it, row after row (`raster`), or to and fro (`serpentine`)",
    )
    anchored: bool = Field(
        default=True,
        description="with a threshold, compare with the units that stay and stand for those gone, so that no error "
        "exceeds the threshold; without, with the neighbours themselves, so that a slow gradient can vanish",
    )


class Predict(PixelStage[PredictOptions]):
    """Of each picture, the units stay that are not the same as what their neighbours predict.

    A unit is the m x m patches that become one token. The tower runs on those that stay, at their positions in the
    whole picture, and the LLM gets their tokens at theirs. Replaying the predictions restores the picture, exactly at
    threshold 0, and with `metric: max` to within the threshold.

    Every time step of a video is a picture of its own, and so is every picture of a call; the released code fails on
    them, or mixes them up. All frames of a time step are compared, where the released code looks at the first alone; a
    picture is a time step of equal frames, for which it is the same. Pixels are compared as the tower gets them: where
    that is half precision, units are equal that differ by less than it can tell.
    """

    Options = PredictOptions
    summary = "units whose pixels their neighbours predict are left out before the vision tower runs"
    paper = "PixelPrune, code OPPO-Mente-Lab/PixelPrune"
    example: ClassVar[Mapping[str, Any]] = {"metric": "rmse", "threshold": 0.7, "std": 0.5}

    def stays(self, units: Float[Tensor, "units width"], grid: tuple[int, int]) -> Bool[Tensor, "units"]:
        """Units that are not predicted."""
        from dropflow_pixelprune.prediction import kept

        own = self.options
        return kept(units, grid, own.metric, own.threshold, own.order, anchored=own.anchored)
