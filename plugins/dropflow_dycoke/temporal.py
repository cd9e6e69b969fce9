"""Temporal thinning: of most frames only the tokens stay that differ from an earlier frame (DyCoke)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from dropflow import Encode, EncodeCall, Forecast, Stage, StageOptions, hookimpl, operators


class TemporalOptions(StageOptions):
    """Options of `dycoke/temporal`."""

    drop: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="share of the tokens of a thinned frame that goes, cut so that whole tokens stay (58 of 196 at the "
        "published 0.7)",
    )
    last_group: bool = Field(
        default=False,
        description="whether the third frame of the last group of four is thinned, too; the released code leaves it "
        "whole",
    )


class Temporal(Stage[TemporalOptions]):
    """In groups of four frames the first stays whole, the others lose the tokens most like those of an earlier frame.

    The second and third are compared with the first and the fourth with the third, place by place. Pictures stay whole;
    newlines and time stamps count for nothing and follow the engine's rule.

    Other than released, tokens stay in raster order, a last frame without partner stays whole instead of being lost,
    videos may have any length, and every video of a batch is handled by itself. DyCoke's second part, which prunes the
    KV cache at every decode step, is not included.
    """

    Options = TemporalOptions
    summary = "of most frames only the tokens stay that differ from an earlier frame"
    paper = "arXiv:2411.15024, temporal token merging"
    example: ClassVar[Mapping[str, Any]] = {"drop": 0.6}

    @property
    def reads_videos(self) -> bool:
        """True: frames are compared with earlier ones."""
        return True

    def forecast(self) -> Forecast:
        """What a frame keeps follows from its number in the video."""
        return Forecast(encoded="data")

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Thin the frames of every video."""
        import torch

        from dropflow_dycoke.thinning import thinned

        drop, last = self.options.drop, self.options.last_group
        with torch.no_grad():
            videos = [operators.whole_frames(call, video) for video in call.videos or ()]
            keeps = [thinned(frames, drop, last_group=last) for frames in videos]
        return Encode(keep=operators.frame_keeps(call, keeps))
