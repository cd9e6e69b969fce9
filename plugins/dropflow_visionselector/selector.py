"""Trained selection: a scorer that is trained with the LLM frozen chooses the rows that reach it (VisionSelector)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field

from dropflow import Encode, EncodeCall, Forecast, Stage, StageContext, StageOptions, Tokens, hookimpl

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from dropflow import Backbone
    from dropflow_visionselector.scoring import Scorer


class SelectorOptions(StageOptions):
    """Options of `visionselector/scorer`."""

    keep: Tokens = Field(
        default=0.2,
        description="visual tokens of each image that reach the LLM, as a count or as a share of the image's tokens, "
        "rounded down; published shares are 0.3, 0.2 and 0.1, all of a scorer trained at 0.2",
    )
    scope: Literal["image", "call"] = Field(
        default="image",
        description="what shares a budget in training: the rows of an `image`, or, as released, of a whole `call`",
    )
    weight_start: float = Field(default=0.1, ge=0, description="weight of the constraint when training begins")
    weight_end: float = Field(
        default=2.0, ge=0, description="its weight when training ends; published 2.0, for LLaVA-OneVision-1.5 3.0"
    )


class Selector(Stage[SelectorOptions]):
    """The rows stay that a trained scorer puts first, in their order and unchanged.

    The scorer (`dropflow_visionselector.scoring.Scorer`) is a module of the stage. In training nothing is dropped:
    every row is multiplied by a soft mask that sums to the budget, and a loss, whose weight rises with the progress of
    training, draws the mask to the hard choice. The LLM is frozen as published, which is the caller's to do.

    Differences from the released code: a budget of all rows keeps all, where the released assertion fails, and one
    of less than a row keeps one; images do not compete for one budget in training, unless `scope: call`; bisection
    runs in float32. Rows that an earlier stage protects stay on top of the number.
    """

    Options = SelectorOptions
    summary = "a trained scorer chooses the visual tokens that reach the LLM"
    paper = "arXiv:2510.16598"
    training_free = False
    needs_training = True
    published_as: ClassVar[tuple[str, ...]] = ("visual.importance_scorer.", "model.visual.importance_scorer.")
    example: ClassVar[Mapping[str, Any]] = {"keep": 0.4}

    def __init__(self, options: SelectorOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._budget = context.scale.tokens(options.keep, context.path("keep"), "at_least_one")

    @property
    def follows_progress(self) -> bool:
        """The weight of the constraint rises."""
        return self.options.weight_start != self.options.weight_end

    def forecast(self) -> Forecast:
        """The budget."""
        return Forecast(encoded=self._budget)

    def build_module(self, backbone: Backbone) -> nn.Module:
        """The scorer of rows as the LLM gets them."""
        from dropflow_visionselector.scoring import Scorer

        return Scorer(backbone.feature_width)

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode | None:
        """Keep the best rows of every image; in training, scale all rows."""
        import torch

        from dropflow.operators import keep_top

        if not call.features:
            return None
        scorer = cast("Scorer", call.module)
        if call.training:
            return self._softly(call, [scorer(rows) for rows in call.features])
        with torch.no_grad():
            scores = tuple(scorer(rows) for rows in call.features)
        own = [torch.zeros_like(score, dtype=torch.long)[None] for score in scores]
        keep = (
            keep_top(score[None], image, [self._budget.of(len(score))])[0]
            for score, image in zip(scores, own, strict=True)
        )
        return Encode(keep=tuple(keep), scores=lambda: scores)

    def _softly(self, call: EncodeCall, scores: list[Float[Tensor, "rows"]]) -> Encode:
        """All rows, each times its soft mask, and the constraint."""
        import torch

        from dropflow.operators import keep_top
        from dropflow_visionselector.scoring import constraint, soft_mask

        options, sizes = self.options, [len(score) for score in scores]
        whole = torch.cat(scores)
        groups = sizes if options.scope == "image" else [sum(sizes)]
        group = torch.repeat_interleave(torch.tensor(groups, device=whole.device))
        counts = [max(1, min(self._budget.of(size), size - 1)) for size in groups]
        soft = soft_mask(whole, group, torch.tensor(counts, device=whole.device).float())
        hard = keep_top(whole.detach()[None], group[None], counts)[0]
        masks = torch.split(soft, sizes)
        weight = options.weight_start + (options.weight_end - options.weight_start) * call.progress
        return Encode(
            rows=tuple(mask.to(rows)[:, None] * rows for mask, rows in zip(masks, call.features, strict=True)),
            places=call.places,
            sizes=call.sizes,
            loss=weight * constraint(soft, hard),
            shares=lambda: tuple(torch.diag(mask.detach()) for mask in masks),
        )
