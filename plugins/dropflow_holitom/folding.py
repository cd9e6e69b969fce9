"""Folding: before a layer of the LLM, tokens the question passes over are merged into those it attends to (HoliTom)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from dropflow import Budget, Depth, Forecast, Keep, PruneCall, Stage, StageContext, StageOptions, hookimpl, operators


class FoldingOptions(StageOptions):
    """Options of `holitom/folding`."""

    at: Depth = Field(default=18, description="boundary of the LLM before which it ranks, by the layer before it")
    keep: float = Field(
        default=0.5, gt=0, le=1, description="share of a video's live tokens that stays, over all its frames"
    )


class Folding(Stage[FoldingOptions]):
    """At one boundary, the half of a video's tokens that the instruction attends to most stays and takes in the rest.

    Score of a token: attention from the last token of the prompt in the layer before the boundary, mean over heads.
    Every other token of the video is merged into the token that stays whose state has the largest cosine with its own;
    a token that stays holds the mean of its own state and of those merged into it, and keeps its position. Shares are
    rounded half to even. Pictures stay whole, and newlines follow the engine's rule. The released code folds one token
    after the other, so that the last one weighs a half; the results are equal where at most one is folded into each.
    Raises `PolicyError` where vision takes no part in the ranking layer.
    """

    Options = FoldingOptions
    summary = "tokens of a video that the question passes over are merged into those it attends to"
    paper = "arXiv:2505.21334, merging inside the LLM"
    example: ClassVar[Mapping[str, Any]] = {"at": 0.5, "keep": 0.5}

    def __init__(self, options: FoldingOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._at = context.scale.boundary(options.at, context.path("at"))
        context.check_layer_before("at", (self._at,))

    @property
    def reads_videos(self) -> bool:
        """True: tokens are merged across the frames of a video."""
        return True

    @property
    def taps(self) -> tuple[int, ...]:
        """The layer before the boundary."""
        return (self._at - 1,)

    def forecast(self) -> Forecast:
        """The data decide how many tokens each frame keeps."""
        return Forecast(keeps={self._at: None})

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        """Keep the best-ranked tokens of every video, and merge the others into them."""
        import torch

        budget = Budget(share=self.options.keep, rounding="half_even")
        with torch.no_grad():
            scores = operators.instruction_scores(call, self._at - 1)
            mask = operators.keep_best_of_videos(call, scores, budget)
            into = operators.most_alike(call.hidden, mask, call.video_id)
        return Keep(mask, scores, merge_into=into)
