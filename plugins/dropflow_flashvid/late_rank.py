"""Late ranking: before a late layer, the tokens of a video stay that the question attends to most (FlashVID)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from dropflow import Budget, Depth, Forecast, Keep, PruneCall, Stage, StageContext, StageOptions, hookimpl, operators


class LateRankOptions(StageOptions):
    """Options of `flashvid/late-rank`."""

    at: Depth = Field(default=20, description="boundary of the LLM before which it ranks, by the layer before it")
    keep: float = Field(
        default=0.3,
        gt=0,
        le=1,
        description="share of a video's live tokens that stays, rounded up, over all its frames",
    )


class LateRank(Stage[LateRankOptions]):
    """Of the tokens of a whole video, those stay that the last instruction token attends to most, at one boundary.

    Score of a token: attention from the last token of the prompt in the layer before the boundary, mean over heads.
    Survivors keep their positions. Pictures stay whole, and newlines follow the engine's rule, where the released code
    ranks them like tokens. Raises `PolicyError` where vision takes no part in the ranking layer.
    """

    Options = LateRankOptions
    summary = "before a late layer, the tokens of a video stay that the question attends to most"
    paper = "arXiv:2602.08024"
    example: ClassVar[Mapping[str, Any]] = {"at": 0.7, "keep": 0.4}

    def __init__(self, options: LateRankOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._at = context.scale.boundary(options.at, context.path("at"))
        context.check_layer_before("at", (self._at,))

    @property
    def reads_videos(self) -> bool:
        """True: a video has one budget."""
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
        """Keep the best-ranked tokens of every video."""
        import torch

        with torch.no_grad():
            scores = operators.instruction_scores(call, self._at - 1)
        return Keep(
            operators.keep_best_of_videos(call, scores, Budget(share=self.options.keep, rounding="ceil")), scores
        )
