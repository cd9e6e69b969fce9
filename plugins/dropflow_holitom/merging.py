"""Merging: static places of a window become one row, and of what moves the most attended tokens stay (HoliTom)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from dropflow import Encode, EncodeCall, Forecast, Stage, StageOptions, hookimpl, operators


class MergingOptions(StageOptions):
    """Options of `holitom/merging`."""

    retention: float = Field(
        default=0.15, gt=0, le=1, description="share of a video's tokens that stays, about; published are 0.10 to 0.25"
    )
    threshold: float = Field(
        default=0.8,
        description="cosine from frame to frame above which a place is static; published are 0.8, and 0.65 with a "
        "retention of 0.10",
    )
    beta: float = Field(
        default=0.6, ge=0, le=1, description="weight of a cluster's centre in its row, against the mean of the others"
    )
    layer: int = Field(
        default=-1,
        description="vision encoder layer whose received attention ranks moving tokens; negative ones count from its "
        "end. In a tower with windowed layers, name one without",
    )


class Merging(Stage[MergingOptions]):
    """A video is cut into windows in which as many places as possible stay the same; each of these is held once.

    Windows are those that save most tokens, by dynamic programming over the whole video. In a window, the means of the
    static places over time are clustered by density peaks, and every cluster is one row in the window's first frame, at
    the place of its centre. Of all other places, every frame keeps the most attended ones, unchanged. What windows save
    raises the rate of the rest, so that about the share `retention` stays. Pictures stay whole; newlines and time
    stamps count for nothing and follow the engine's rule.

    Other than released: rows lie in raster order, a window keeps at least one row of its static places, equal densities
    count in raster order instead of at random, and every video of a batch is reduced at its own rate. Where tokens are
    pooled from several patches, the attention they receive is pooled alike.
    """

    Options = MergingOptions
    summary = "static places of a video's windows become clusters, of the rest the most attended tokens stay"
    paper = "arXiv:2505.21334"
    example: ClassVar[Mapping[str, Any]] = {"retention": 0.5, "threshold": 0.0}
    needs = frozenset({"vision_attention"})

    @property
    def reads_videos(self) -> bool:
        """True: places are compared over time."""
        return True

    @property
    def vision_taps(self) -> tuple[int, ...]:
        """The ranking layer."""
        return (self.options.layer,)

    def forecast(self) -> Forecast:
        """The data decide how many rows each frame has."""
        return Forecast(encoded="data")

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode | None:
        """Reduce every video."""
        import torch

        from dropflow_holitom.blend import blend

        if not call.videos:
            return None
        own = self.options
        with torch.no_grad():
            received = call.received_attention(own.layer)
            blends = [
                blend(
                    operators.whole_frames(call, video),
                    torch.stack([received[frame] for frame in video]),
                    own.retention,
                    own.threshold,
                    own.beta,
                )
                for video in call.videos
            ]
        return operators.blended(call, blends)
