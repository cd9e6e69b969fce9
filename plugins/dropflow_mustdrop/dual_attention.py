"""The dual-attention filter: a visual token goes if neither the text as a whole nor any word looks at it (stage 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from dropflow import (
    Budget,
    Depth,
    Forecast,
    Keep,
    PruneCall,
    Stage,
    StageContext,
    StageOptions,
    Tokens,
    hookimpl,
    operators,
)


class DualAttentionOptions(StageOptions):
    """Options of `mustdrop/dual-attention`."""

    at: list[Depth] | None = Field(
        default=None,
        min_length=1,
        description="boundaries to filter at, by the thresholds; each is ranked by the layer before it, so these "
        "are the published pruning layers plus one",
    )
    keep: dict[Depth, Tokens] | None = Field(
        default=None,
        min_length=1,
        description="instead of `at`: boundary -> visual tokens per image that stay after it, protected ones "
        "included, ranked by the same scores",
    )
    global_threshold: float = Field(
        default=0.001,
        ge=0,
        description="share of the attention from all text to its picture below which a token may go; with `keep` only "
        "the ratio of both thresholds counts",
    )
    individual_threshold: float = Field(
        default=0.001,
        ge=0,
        description="attention probability from the text token that looks at it most below which a token may go",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.at is None) == (self.keep is None):
            raise ValueError("expected either `at` (filter by thresholds) or `keep` (filter to a fixed budget)")
        if self.keep is not None and not (self.global_threshold and self.individual_threshold):
            raise ValueError("with `keep` both thresholds weigh the scores, so that they must be above 0")
        return self


class DualAttention(Stage[DualAttentionOptions]):
    """At each boundary a token goes if both its scores are below their thresholds; reaching one of them keeps it.

    Scores come from the attention of the layer before the boundary, averaged over heads, from the text tokens after the
    first image up to the last instruction token: their sum, as a share of what all tokens of the same picture get
    (tiles without text in between are one picture), and their maximum. Softmax runs over all keys. A sample without
    text after its image is not pruned. Raises `PolicyError` where vision takes no part in the layer before a boundary.
    """

    Options = DualAttentionOptions
    summary = "drops visual tokens that neither the text as a whole nor any one text token attends to"
    paper = "arXiv:2411.10803, prefilling stage"
    example: ClassVar[Mapping[str, Any]] = {"keep": {0.35: 0.5, 0.7: 0.2}}

    def __init__(self, options: DualAttentionOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._keeps = _boundaries(options, context)

    @property
    def taps(self) -> tuple[int, ...]:
        """The layers before the boundaries."""
        return tuple(boundary - 1 for boundary in self._keeps)

    def forecast(self) -> Forecast:
        """The budgets; with thresholds the data decides."""
        return Forecast(keeps=self._keeps)

    @hookimpl
    def prune(self, call: PruneCall) -> Keep | None:
        """Keep what the text attends to."""
        import torch

        from dropflow_mustdrop.filtering import attention_scores, block_totals, dual_keep, dual_ranking

        rows, asks = operators.text_rows(call)
        if not rows.shape[1]:
            return None
        with torch.no_grad():
            sums, peaks = attention_scores(operators.row_parts(call, call.boundary - 1, rows, asks))
        totals = block_totals(sums.masked_fill(call.image_id < 0, 0), call.valid & ~call.text)
        thresholds = (self.options.global_threshold, self.options.individual_threshold)
        unranked = ~asks.any(1, keepdim=True)
        budget = self._keeps[call.boundary]
        if budget is None:
            return Keep(dual_keep(sums, peaks, totals, *thresholds) | unranked, sums)
        ranking = dual_ranking(sums, peaks, totals, *thresholds)
        best = operators.keep_top(ranking.masked_fill(call.protected, torch.inf), call.image_id, call.counts(budget))
        return Keep(best | unranked, ranking)


def _boundaries(options: DualAttentionOptions, context: StageContext) -> Mapping[int, Budget | None]:
    option = "at" if options.keep is None else "keep"
    found = dict.fromkeys(context.boundaries("at", options.at or ())) | context.budgets("keep", options.keep or {})
    context.check_layer_before(option, found)
    return found
