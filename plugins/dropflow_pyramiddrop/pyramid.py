"""Pyramid pruning: every boundary keeps a fixed part of the tokens at entry (PyramidDrop, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from dropflow import Depth, Forecast, Keep, PruneCall, Stage, StageContext, StageOptions, Tokens, hookimpl, operators


class PyramidOptions(StageOptions):
    """Options of `pyramiddrop/pyramid`."""

    keep: dict[Depth, Tokens] = Field(
        default={0.25: 0.5, 0.5: 0.25, 0.75: 0.125},
        min_length=1,
        description="boundary -> visual tokens per image that stay after it, protected ones included; a share is of "
        "the tokens at entry, rounded down, as published (lambda = 0.5 at 8, 16 and 24 of 32 layers)",
    )


class Pyramid(Stage[PyramidOptions]):
    """At each boundary, the visual tokens of each image that the instruction attends to most stay.

    Score of a token: attention probability from the last instruction token by the norm, q and k of the layer after the
    boundary, applied to the tokens live before it, mean over heads; the softmax runs over all keys (section 3.2). With
    labels it is the mean over the tokens before every answer, and a sample without labels is not pruned. The choice is
    hard and gets no gradient. Every image is ranked by itself (the released code ranks only the first). Positions are
    the policy's: published numbers were made with `positions: compact`.
    """

    Options = PyramidOptions
    summary = "at a few boundaries the tokens that the instruction attends to most stay, half as many each time"
    paper = "arXiv:2410.17247, section 3.2"
    training_free = False
    example: ClassVar[Mapping[str, Any]] = {"keep": {0.35: 0.5, 0.7: 0.25}}

    def __init__(self, options: PyramidOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._keeps = context.budgets("keep", options.keep, "floor")

    def forecast(self) -> Forecast:
        """The budgets."""
        return Forecast(keeps=self._keeps)

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        """Keep the best-ranked visual tokens of each image."""
        scores = operators.instruction_scores(call)
        return Keep(operators.keep_best(call, scores, self._keeps[call.boundary]), scores)
