"""Frame compensation: unusual frames keep more tokens, and every frame its unusual ones (VidCom2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from dropflow import Encode, EncodeCall, Forecast, Stage, StageOptions, hookimpl, operators


class FrameCompensationOptions(StageOptions):
    """Options of `vidcom2/frame-compensation`."""

    retention: float = Field(
        default=0.25, gt=0, le=1, description="share of a video's tokens that stays, averaged over its frames"
    )
    exact_count: bool = Field(
        default=False,
        description="whether exactly that share stays of every video, cut to a whole number and at least one token per "
        "frame, as servers need it: tokens of which too many would stay go wherever they are the most usual, so that a "
        "frame may lose all; published is the sum of rounded shares, which is only near",
    )


class FrameCompensation(Stage[FrameCompensationOptions]):
    """Of each frame of a video the tokens stay that are least like the mean of the video and that of their frame.

    Tokens are compared in the half of the channels that vary least, by a sum of Gaussian kernels. How much of a frame
    stays follows from how unlike the video's mean its tokens are: nearly all that can be shifted goes to one frame, and
    every frame keeps a token or more. The order of frames does not matter, and neither does the question. Pictures stay
    whole; newlines, CLS rows and time stamps count for nothing and follow the engine's rule.

    Other than released, every video of a batch is handled by itself, frames may have any size, and tokens that tie
    are kept in raster order. LLaVA-Video's code keeps all newlines, which the engine drops with their last patch.
    """

    Options = FrameCompensationOptions
    summary = "the unusual tokens of a video stay, more of them in unusual frames"
    paper = "arXiv:2505.14454"
    example: ClassVar[Mapping[str, Any]] = {"retention": 0.5}

    @property
    def reads_videos(self) -> bool:
        """True: tokens are compared with those of all frames."""
        return True

    def forecast(self) -> Forecast:
        """The data decide how many tokens each frame keeps."""
        return Forecast(encoded="data")

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Keep the unusual tokens of every video."""
        import torch

        from dropflow_vidcom2.uniqueness import Usual, counts, exactly, least

        keeps, scores, retention = [], [], self.options.retention
        with torch.no_grad():
            for video in call.videos or ():
                frames = operators.whole_frames(call, video)
                usual, (length, rows) = Usual.of(frames), frames.shape[:2]
                keep = least(usual.both, counts(usual.shares(retention), rows))
                if self.options.exact_count:
                    count = int(length * rows * (1 - (1 - retention)))  # as servers cut it, from the share that goes
                    keep = exactly(keep, usual.both, max(length, count))
                keeps.append(keep)
                scores.append(-usual.both)
        return Encode(keep=operators.frame_keeps(call, keeps), scores=lambda: operators.frame_scores(call, scores))
