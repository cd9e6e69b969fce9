"""Retention: of a video, the tokens that changed most since the frame before stay (EVS)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from dropflow import Encode, EncodeCall, Forecast, Stage, StageOptions, hookimpl, operators


class RetentionOptions(StageOptions):
    """Options of `evs/retention`."""

    rate: float = Field(
        default=0.7,
        ge=0,
        lt=1,
        description="share of a video's tokens that go; the tokens of its first frame stay in any case. vLLM, SGLang "
        "and transformers call it `video_pruning_rate`; 0.7 is SGLang's example",
    )


class Retention(Stage[RetentionOptions]):
    """Of all tokens of a video those stay that differ most from the token at their place in the frame before.

    The budget is that of the whole video, exact, and at least one frame: a cut in the scene takes a whole frame, and a
    frame that shows nothing new may keep no token. The first frame stays whole. Text between frames, such as time
    stamps, stays, also of frames that kept nothing; newlines and CLS rows count for nothing and follow the engine's
    rule. Pictures stay whole. What a frame keeps does not depend on later frames, except through the budget.

    Other than in transformers' Nemotron, every video of a batch is compared and counted by itself, grids need not be
    square, and position ids are those of the unmodified model. Cosines are taken in float32, and equal frames tie.
    """

    Options = RetentionOptions
    summary = "the tokens of a video stay that changed most since the frame before"
    paper = "arXiv:2510.14624"
    example: ClassVar[Mapping[str, Any]] = {"rate": 0.3}

    @property
    def reads_videos(self) -> bool:
        """True: a video's tokens are compared from frame to frame."""
        return True

    def forecast(self) -> Forecast:
        """The data decide how many tokens each frame keeps."""
        return Forecast(encoded="data")

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Keep the most changed tokens of every video."""
        import torch

        from dropflow_evs.change import change, most_changed, retained

        keeps, scores = [], []
        with torch.no_grad():
            for video in call.videos or ():
                frames = operators.whole_frames(call, video)
                scores.append(change(frames))
                count = retained(frames.shape[0], frames.shape[1], self.options.rate)
                keeps.append(most_changed(scores[-1], count))
        return Encode(keep=operators.frame_keeps(call, keeps), scores=lambda: operators.frame_scores(call, scores))
