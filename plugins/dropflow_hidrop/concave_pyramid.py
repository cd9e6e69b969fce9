"""Concave pyramid pruning: a few boundaries keep fast-shrinking numbers of visual tokens (HiDrop, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

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
from dropflow.errors import PolicyError

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


class AverageBudget(StageOptions):
    """A target from which the first keep is solved."""

    average_tokens: float = Field(gt=0, description="visual tokens per layer, averaged over all layers of the LLM")


class ConcavePyramidOptions(StageOptions):
    """Options of `hidrop/concave-pyramid`."""

    keep: dict[Depth, Tokens | Literal["solve"]] = Field(
        min_length=1,
        description="boundary -> visual tokens per image that stay after it; the first may be `solve`, with `budget`",
    )
    budget: AverageBudget | None = Field(
        default=None, description="solve the first keep so that the average over all layers meets this target"
    )
    split: Literal["per_image", "total"] = Field(
        default="per_image",
        description="what a count of `keep` is for: every image, or all images of a sample together; shares are always "
        "per image",
    )
    select: Literal["exact", "reference", "soft"] = Field(
        default="exact",
        description="`exact` keeps exactly k, ties to the lowest index; `reference` keeps tie groups, as published; "
        "`soft` keeps what `exact` keeps and, in training, passes gradients to the scores",
    )
    temperature: float = Field(
        default=0.5,
        gt=0,
        description="of `select: soft`, in standard deviations of an image's log scores: how far from the threshold a "
        "token still gets gradient",
    )


class ConcavePyramid(Stage[ConcavePyramidOptions]):
    """At each boundary, the visual tokens of each image that the instruction attends to most stay.

    Score of a token: attention probability from the last instruction token (with labels, the mean over the last
    instruction token of every round), by the norm, q and k of the layer after the boundary, averaged over heads; the
    softmax runs over all keys (HiDrop, section 3.2, after PyramidDrop). A sample without an instruction token, such as
    one whose labels are all -100, is not pruned.

    With `select: soft` the choice is trained: see `dropflow_hidrop.topk.soft_weights` for the estimator.
    """

    Options = ConcavePyramidOptions
    summary = "attention-ranked pruning at a few boundaries, fast first and then slowly"
    paper = "arXiv:2602.23699, section 3.2"
    training_free = False
    example: ClassVar[Mapping[str, Any]] = {"keep": {0.35: 0.5, 0.7: 0.2}}

    def __init__(self, options: ConcavePyramidOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._keeps = _budgets(options, context)

    @property
    def differentiable(self) -> bool:
        """With `select: soft`."""
        return self.options.select == "soft"

    def forecast(self) -> Forecast:
        """The keeps, the solved one included."""
        return Forecast(keeps=self._keeps)

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        """Keep the best-ranked visual tokens of each image."""
        from dropflow_hidrop.topk import soft_weights

        scores = operators.instruction_scores(call)
        counts = self._counts(call, self._keeps[call.boundary])
        # tokens that stay in any case count against the budget, so that the schedule holds
        ranking = scores.masked_fill(call.protected, math.inf)
        keep = operators.keep_top(ranking, call.image_id, counts, keep_ties=self.options.select == "reference")
        unranked = ~call.instruction_valid.any(1, keepdim=True)
        if not call.differentiable:
            return Keep(keep | unranked, scores)
        chosen = call.image_id.masked_fill(call.protected | unranked, -1)
        return Keep(keep | unranked, scores, soft_weights(scores, chosen, keep, self.options.temperature))

    def _counts(self, call: PruneCall, budget: Budget) -> Sequence[int] | Int[Tensor, "images"]:
        """Tokens that stay of each image, by image number."""
        if self.options.split != "total" or budget.tokens is None:
            return call.counts(budget)
        counts = [budget.of(size) for size in call.image_sizes]
        for own in call.image_id.tolist():
            images = sorted({image for image in own if image >= 0})
            shares = operators.divide(budget.tokens, [call.image_sizes[image] for image in images])
            for image, share in zip(images, shares, strict=True):
                counts[image] = share
        return counts


def _budgets(options: ConcavePyramidOptions, context: StageContext) -> Mapping[int, Budget]:
    scale = context.scale
    keeps: dict[int, Budget | None] = {}
    for depth, tokens in options.keep.items():
        path = context.path(f"keep.{depth}")
        boundary = scale.boundary(depth, path)
        if boundary in keeps:
            raise PolicyError(f"{path}: boundary {boundary} is named twice on a model of {scale.target.layers} layers")
        keeps[boundary] = None if tokens == "solve" else scale.tokens(tokens, path)
    first = min(keeps)
    if [b for b, budget in keeps.items() if budget is None] not in ([], [first]):
        raise PolicyError(f"{context.path('keep')}: only the first boundary ({first}) can be `solve`")
    if options.budget is not None:
        keeps[first] = _solve(options.budget.average_tokens, keeps, context)
    solved = {b: budget for b, budget in sorted(keeps.items()) if budget is not None}
    if len(solved) < len(keeps):
        raise PolicyError(f"{context.path('budget')}: missing; `solve` needs `budget: {{average_tokens: ...}}`")
    return solved


def _solve(average: float, keeps: Mapping[int, Budget | None], context: StageContext) -> Budget:
    shape, path = context.scale.target, context.path("budget.average_tokens")
    if shape.visual_tokens is None:
        raise PolicyError(f"{path}: this backbone's images differ in size; give the first keep as a share instead")
    counts = {b: None if budget is None else budget.of(shape.visual_tokens) for b, budget in keeps.items()}
    try:
        solved = operators.first_keep(average, shape.layers, shape.visual_tokens, context.window, counts)
    except ValueError as error:
        raise PolicyError(f"{path}: {error}") from None
    return Budget(tokens=solved)
