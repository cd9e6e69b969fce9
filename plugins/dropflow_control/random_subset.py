"""Random pruning: as many visual tokens as a method keeps, chosen without looking at what they show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator

from dropflow import Encode, EncodeCall, Forecast, Keep, PruneCall, Stage, StageContext, StageOptions, hookimpl
from dropflow.selection import keep_top
from dropflow.units import Depth, Tokens
from dropflow_control.draw import draw


class RandomSubsetOptions(StageOptions):
    """Options of `control/random`."""

    keep: dict[Depth, Tokens] | None = Field(
        default=None,
        min_length=1,
        description="boundary -> visual tokens per image that stay behind it, protected ones included",
    )
    encode: Tokens | None = Field(
        default=None, description="instead of `keep`: visual tokens of each image that reach the LLM"
    )
    seed: int = Field(default=0, ge=0, description="another seed keeps other tokens")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.keep is None) == (self.encode is None):
            raise ValueError("expected either `keep` (at boundaries of the LLM) or `encode` (in front of it)")
        return self


class RandomSubset(Stage[RandomSubsetOptions]):
    """A random subset of each image's tokens stays; every boundary draws anew among the tokens that are left.

    The same seed keeps the same tokens of an image, alone or in any batch; other images of the same size keep others.
    Tokens that an earlier `encode` stage protects stay on top of the number that `encode` says.
    """

    Options = RandomSubsetOptions
    summary = "a control: a random subset of each image's tokens stays"
    example: ClassVar[Mapping[str, Any]] = {"keep": {0.35: 0.5, 0.7: 0.2}}

    def __init__(self, options: RandomSubsetOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._keeps = context.budgets("keep", options.keep or {})
        self._encoded = None if options.encode is None else context.scale.tokens(options.encode, context.path("encode"))

    @property
    def prune_at(self) -> tuple[int, ...]:
        """The boundaries of `keep`."""
        return tuple(self._keeps)

    @property
    def encode_at(self) -> tuple[int | None, ...]:
        """The output of the vision encoder, with `encode`."""
        return () if self._encoded is None else (None,)

    def forecast(self) -> Forecast:
        """The budgets."""
        return Forecast(encoded=self._encoded, keeps=self._keeps)

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode | None:
        """Keep random rows of every image."""
        if self._encoded is None:
            return None
        masks = []
        for features in call.features:
            kept = draw(self.options.seed, None, features).topk(self._encoded.of(len(features))).indices
            mask = torch.zeros(len(features), dtype=torch.bool)
            mask[kept] = True
            masks.append(mask.to(features.device))
        return Encode(keep=tuple(masks))

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        """Keep random tokens of every image."""
        scores = torch.zeros(call.image.shape, device=call.image.device)
        for image in range(len(call.image_sizes)):
            own = call.image == image
            scores[own] = draw(self.options.seed, call.boundary, call.hidden[own]).to(scores)
        budget = self._keeps[call.boundary]
        counts = [budget.of(size) for size in call.image_sizes]
        return Keep(keep_top(scores.masked_fill(call.protected, torch.inf), call.image, counts), scores)
