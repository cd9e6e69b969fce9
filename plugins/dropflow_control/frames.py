"""Uniform frame sampling: whole frames at even distances stay, as many tokens as a method keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from dropflow import Encode, EncodeCall, Forecast, Stage, StageContext, StageOptions, Tokens, hookimpl, operators

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor


class FramesOptions(StageOptions):
    """Options of `control/frames`."""

    keep: Tokens = Field(description="visual tokens of each video that stay, as a count or as a share of the video's")


class Frames(Stage[FramesOptions]):
    """Whole frames of a video at even distances stay, all others go; pictures stay whole.

    So that the control keeps exactly as many tokens as a method, the last of these frames keeps only what is left of
    the budget, evenly spread over its grid.
    """

    Options = FramesOptions
    summary = "a control: whole frames of a video at even distances stay"
    example: ClassVar[Mapping[str, Any]] = {"keep": 0.6}

    def __init__(self, options: FramesOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._budget = context.scale.tokens(options.keep, context.path("keep"))

    @property
    def reads_videos(self) -> bool:
        """True: it drops whole frames."""
        return True

    def forecast(self) -> Forecast:
        """What is left of a frame follows from its number in the video."""
        return Forecast(encoded="data")

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Keep frames of every video."""
        keeps = []
        for video in call.videos or ():
            length, rows, _ = operators.whole_frames(call, video).shape
            own = self._rows(length, call.grids[video[0]] or (1, rows), self._budget.of(length * rows))
            keeps.append(own.to(call.places[0].device))
        return Encode(keep=operators.frame_keeps(call, keeps))

    def _rows(self, length: int, grid: tuple[int, int], count: int) -> Bool[Tensor, "frames rows"]:
        """Which `count` rows of the grids of so many frames stay."""
        import torch

        from dropflow_control.spacing import evenly, spread

        whole, rest = divmod(count, grid[0] * grid[1])
        chosen = evenly(torch.arange(length), whole + bool(rest), length).nonzero()[:, 0]
        keep = torch.zeros(length, grid[0] * grid[1], dtype=torch.bool)
        keep[chosen[:whole]] = True
        if rest:
            keep[chosen[-1]] = spread(rest, grid)
        return keep
