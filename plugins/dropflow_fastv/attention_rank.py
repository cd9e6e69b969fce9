"""Pruning once after the first layers, by the attention of the layer that has just run (FastV, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from dropflow import (
    Depth,
    Forecast,
    Keep,
    PruneCall,
    Rounding,
    Stage,
    StageContext,
    StageOptions,
    Tokens,
    hookimpl,
    operators,
)


class AttentionRankOptions(StageOptions):
    """Options of `fastv/attention-rank`."""

    at: Depth = Field(
        default=2,
        description="boundary to prune at, the published K; the layer before it, K - 1, ranks",
    )
    keep: Tokens = Field(
        default=0.5,
        description="visual tokens per image that stay, protected ones included; a share is 1 - R in the paper's terms",
    )
    rounding: Rounding = Field(
        default="half_up",
        description="how a share becomes a number of tokens: `half_up` keeps at least one; `half_even` is the released "
        "code for LLaVA in transformers, `floor` the one for lmms-eval",
    )


class AttentionRank(Stage[AttentionRankOptions]):
    """At one boundary, the visual tokens of each image that the last instruction token attends to most stay.

    Score of a token: attention probability from the last token of the prompt in the layer before the boundary,
    mean over heads; the softmax runs over all keys (section 4.1, where the text says "from all tokens"; the released
    code reads the last row). Survivors keep their order and positions; the choice is made once, in the prefill. With
    labels it is the mean over the tokens before every answer. Every sample is ranked by its own attention (the
    released code ranks a batch by its first sample). Raises `PolicyError` where vision takes no part in the ranking
    layer.
    """

    Options = AttentionRankOptions
    summary = "after the first layers, the tokens that the last prompt token attends to most stay"
    paper = "arXiv:2403.06764, section 4.1"
    example: ClassVar[Mapping[str, Any]] = {"at": 0.35, "keep": 0.4}

    def __init__(self, options: AttentionRankOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._at = context.scale.boundary(options.at, context.path("at"))
        self._budget = context.scale.tokens(options.keep, context.path("keep"), options.rounding)
        context.check_layer_before("at", (self._at,))

    @property
    def taps(self) -> tuple[int, ...]:
        """The layer before it."""
        return (self._at - 1,)

    def forecast(self) -> Forecast:
        """The budget, from the boundary on."""
        return Forecast(keeps={self._at: self._budget})

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        """Keep the best-ranked visual tokens of each image."""
        import torch

        with torch.no_grad():
            scores = operators.instruction_scores(call, self._at - 1)
        return Keep(operators.keep_best(call, scores, self._budget), scores)
