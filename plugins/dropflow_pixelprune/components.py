"""Of every connected component of equal units some stay: the baseline that PixelPrune is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from dropflow_pixelprune.pixels import PixelOptions, PixelStage

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class ComponentsOptions(PixelOptions):
    """Options of `pixelprune/components`."""

    skip: float = Field(ge=0, le=1, description="share of the units of a component that go; one stays in any case")


class Components(PixelStage[ComponentsOptions]):
    """Of each connected component of units that are the same, some stay, at even distances in raster order.

    Neighbours are the units to the left, right, above and below. Of a component of n units, n - round(n * skip) stay,
    at least one. The host waits for the device once for each picture.
    """

    Options = ComponentsOptions
    summary = "a baseline: of connected units with the same pixels, a share is left out before the vision tower runs"
    paper = "PixelPrune, code OPPO-Mente-Lab/PixelPrune"
    example: ClassVar[Mapping[str, Any]] = {"skip": 0.7, "metric": "rmse", "threshold": 0.7, "std": 0.5}

    def stays(self, units: Float[Tensor, "units width"], grid: tuple[int, int]) -> Bool[Tensor, "units"]:
        """A share of every component."""
        from dropflow_pixelprune.prediction import components, spread

        return spread(components(units, grid, self.options.metric, self.options.threshold), self.options.skip)
