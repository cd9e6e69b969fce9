"""Concave pyramid pruning: a few boundaries keep fast-shrinking numbers of visual tokens (HiDrop, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

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
from dropflow.errors import PolicyError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor, nn

    from dropflow import Backbone
    from dropflow_hidrop.keep_ratios import KeepRatios, N


class PyramidBudget(StageOptions):
    """A target from which the first keep is solved, or that a learned schedule is held to."""

    average_tokens: float | None = Field(
        default=None, gt=0, description="visual tokens per layer, averaged over all layers of the LLM"
    )
    flops: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="of `learn`: multiply-adds of the LLM on visual tokens, as a share of those without a policy",
    )

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.average_tokens is None) == (self.flops is None):
            raise ValueError("expected either `average_tokens` or `flops`")
        return self


class ConcavePyramidOptions(StageOptions):
    """Options of `hidrop/concave-pyramid`."""

    keep: dict[Depth, Tokens | Literal["solve"]] = Field(
        min_length=1,
        description="boundary -> visual tokens per image that stay after it; the first may be `solve`, with `budget`",
    )
    budget: PyramidBudget | None = Field(
        default=None,
        description="solve the first keep so that the average over all layers meets this target; with `learn`, the "
        "schedule is held to it",
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
        description="of `select: soft` and `learn`, in standard deviations of an image's log scores: how far from the "
        "threshold a token still gets gradient",
    )
    learn: bool = Field(
        default=False,
        description="train how many tokens stay: `keep` is the start, `budget` the target, and training relaxes the "
        "choice, from `temperature` to `final_temperature`",
    )
    final_temperature: float = Field(default=0.05, gt=0, description="of `learn`: the temperature at the end")
    budget_weight: float = Field(
        default=10.0,
        ge=0,
        description="of `learn`: weight, in the loss, of the squared relative distance from the budget",
    )

    @model_validator(mode="after")
    def _learnable(self) -> Self:
        if self.learn and self.budget is None:
            raise ValueError("`learn` needs a `budget`, or every token would stay; add `budget: {average_tokens: ...}`")
        if self.learn and self.split != "per_image":
            raise ValueError("`learn` trains shares of every image; leave `split` out")
        if self.budget is not None and self.budget.flops is not None and not self.learn:
            raise ValueError("`budget.flops` is a target of `learn`; set `learn: true`, or give `average_tokens`")
        return self


class ConcavePyramid(Stage[ConcavePyramidOptions]):
    """At each boundary, the visual tokens of each image that the instruction attends to most stay.

    Score of a token: attention probability from the last instruction token (with labels, the mean over the last
    instruction token of every round), by the norm, q and k of the layer after the boundary, averaged over heads; the
    softmax runs over all keys (HiDrop, section 3.2, after PyramidDrop). A sample without an instruction token, such as
    one whose labels are all -100, is not pruned.

    With `select: soft` the choice is trained: see `dropflow_hidrop.topk.soft_weights` for the estimator.

    With `learn` the counts are trained, as the paper describes and its code does not: while the model trains, every
    token stays, with the weight that a relaxed top-k of a real count gives it (`dropflow_hidrop.topk.relaxed_weights`),
    and a loss holds the schedule to its budget. Otherwise the counts are the learned shares, rounded.
    """

    Options = ConcavePyramidOptions
    summary = "attention-ranked pruning at a few boundaries, fast first and then slowly"
    paper = "arXiv:2602.23699, section 3.2"
    training_free = False
    example: ClassVar[Mapping[str, Any]] = {"keep": {0.35: 0.5, 0.7: 0.2}}

    float32: ClassVar[bool] = True

    def __init__(self, options: ConcavePyramidOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._keeps = _budgets(options, context)
        self._start = _shares(self._keeps, context) if options.learn else {}

    @property
    def differentiable(self) -> bool:
        """With `select: soft` or `learn`."""
        return self.options.select == "soft" or self.options.learn

    @property
    def follows_progress(self) -> bool:
        """With `learn`: the temperature falls."""
        return self.options.learn and self.options.final_temperature != self.options.temperature

    def forecast(self) -> Forecast:
        """The keeps, the solved one included; with `learn` they are not known."""
        return Forecast(keeps=dict.fromkeys(self._keeps) if self.options.learn else self._keeps)

    def build_module(self, backbone: Backbone) -> nn.Module | None:
        """With `learn`, the keep ratios."""
        if not self.options.learn:
            return None
        from dropflow_hidrop.keep_ratios import KeepRatios

        widths = backbone.decoder_widths
        return KeepRatios(list(self._start.values()), widths.hidden, widths.intermediate)

    def learned(self, module: nn.Module) -> dict[str, Any]:
        """The learned schedule as counts within the budget; as shares where images differ in size."""
        from dropflow_hidrop.keep_ratios import fitted_counts

        tokens = self.context.scale.target.visual_tokens
        found = dict(zip(self._start, _ratios(module).shares().tolist(), strict=True))
        # a share of 0 is none, and any above it keeps a token
        keep: Mapping[int, int | float] = {boundary: max(round(share, 4), 1e-4) for boundary, share in found.items()}
        if tokens is not None:

            def cost(counts: Sequence[int]) -> float:
                return self._cost([float(tokens), *map(float, counts)], float(tokens), _ratios(module))

            keep = fitted_counts(found, tokens, cost, self._target)
        training = dict.fromkeys(("learn", "budget", "temperature", "final_temperature", "budget_weight"))
        return {"keep": keep, **training, **({"select": "exact"} if self.options.select == "soft" else {})}

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        """Keep the best-ranked visual tokens of each image."""
        from dropflow_hidrop.topk import soft_weights

        scores = operators.instruction_scores(call)
        if self.options.learn and call.differentiable:
            return self._relaxed(call, scores)
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
        if self.options.learn:
            sizes = _sizes(call)
            return (sizes * self._share(call) + 0.5).floor().clamp(min=1).minimum(sizes).long()
        if self.options.split != "total" or budget.tokens is None:
            return call.counts(budget)
        counts = [budget.of(size) for size in call.image_sizes]
        for own in call.image_id.tolist():
            images = sorted({image for image in own if image >= 0})
            shares = operators.divide(budget.tokens, [call.image_sizes[image] for image in images])
            for image, share in zip(images, shares, strict=True):
                counts[image] = share
        return counts

    def _share(self, call: PruneCall) -> Float[Tensor, ""]:
        """The share of an image's tokens that stays at the payload's boundary."""
        shares = _ratios(call.module).shares()
        return shares[list(self._start).index(call.boundary)].to(call.hidden.device)

    def _relaxed(self, call: PruneCall, scores: Float[Tensor, "batch slots"]) -> Keep:
        """Every token that has a weight, with its weight; at the first boundary also the loss of the budget."""
        import torch

        from dropflow_hidrop.keep_ratios import annealed
        from dropflow_hidrop.topk import LEAST_WEIGHT, relaxed_weights

        options, module = self.options, _ratios(call.module)
        temperature = annealed(options.temperature, options.final_temperature, call.progress)
        image, staying = call.image_id.clamp(min=0), call.protected & (call.image_id >= 0)
        held = torch.zeros_like(_sizes(call)).scatter_add(0, image.flatten(), staying.flatten().float())
        counts = _sizes(call) * self._share(call) - held  # what stays in any case counts against the budget
        unranked = ~call.instruction_valid.any(1, keepdim=True)
        chosen = call.image_id.masked_fill(call.protected | unranked, -1)
        weights = relaxed_weights(scores, chosen, counts, temperature)
        keep = (weights.detach() >= LEAST_WEIGHT) | unranked
        loss = None
        if call.boundary == next(iter(self._start)) and call.image_sizes:
            whole = sum(call.image_sizes) / len(call.image_sizes)
            live = [torch.full_like(module.shares()[0], whole), *(module.shares() * whole)]
            loss = options.budget_weight * (self._cost(live, whole, module) / self._target - 1).square()
        return Keep(keep, scores.detach(), torch.where(chosen >= 0, weights, 1.0), loss=loss)

    @property
    def _target(self) -> float:
        budget = self.options.budget
        assert budget is not None  # the options are refused without one
        return budget.average_tokens or budget.flops or 0.0

    def _cost(self, live: Sequence[N], whole: float, module: KeepRatios) -> N:
        """What the budget limits, where `live` tokens are live from the entry and from each boundary on."""
        from dropflow_hidrop.keep_ratios import average_tokens, share_of_work

        window, layers = self.context.window, self.context.scale.target.layers
        spans = [end - start for start, end in pairwise((window.entry, *self._start, window.exit))]
        if self.options.budget is not None and self.options.budget.flops is not None:
            return share_of_work(live, spans, layers, whole, module)
        return average_tokens(live, spans, layers)


def _sizes(call: PruneCall) -> Float[Tensor, "images"]:
    """Tokens that each image had at entry to the LLM."""
    import torch

    sizes = call.patches
    return (torch.tensor(call.image_sizes, device=call.hidden.device) if sizes is None else sizes).float()


def _ratios(module: nn.Module | None) -> KeepRatios:
    return cast("KeepRatios", module)


def _shares(keeps: Mapping[int, Budget], context: StageContext) -> dict[int, float]:
    """The share of an image's tokens that each budget keeps."""
    tokens = context.scale.target.visual_tokens
    if tokens is None and any(budget.share is None for budget in keeps.values()):
        raise PolicyError(
            f"{context.path('keep')}: `learn` trains shares, and this backbone's images differ in size; give shares "
            "instead of counts"
        )
    found = {
        boundary: budget.share if budget.share is not None else budget.of(tokens or 0) / (tokens or 1)
        for boundary, budget in keeps.items()
    }
    for boundary, share in found.items():
        if not share:
            raise PolicyError(
                f"{context.path('keep')}: `learn` starts with a token or more at every boundary, got 0 at {boundary}; "
                "let `hidrop/early-exit` drop all"
            )
    return found


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
    average = None if options.budget is None else options.budget.average_tokens
    if average is not None and (keeps[first] is None or not options.learn):
        keeps[first] = _solve(average, keeps, context)
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
