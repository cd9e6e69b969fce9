"""The output-aware cache: the answer reads only the visual tokens that survived the prefill (MustDrop, stage 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from dropflow import (
    CacheCall,
    CacheKeep,
    CacheView,
    Depth,
    Stage,
    StageContext,
    StageOptions,
    Tokens,
    hookimpl,
    operators,
)
from dropflow.errors import PolicyError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class OutputAwareCacheOptions(StageOptions):
    """Options of `mustdrop/output-aware-cache`."""

    at: Depth = Field(
        description="boundary from which on the layers' caches are reduced: the published first pruning layer"
    )
    interval: int = Field(
        default=0,
        ge=0,
        description="while decoding, evict visual entries again every so many new tokens; 0 (as published) never does",
    )
    threshold: float | None = Field(
        default=None,
        gt=0,
        description="with `interval`: a visual entry goes from a layer if no generated token has given it this much "
        "attention there (a probability, mean over heads)",
    )
    budget: Tokens | None = Field(
        default=None,
        description="with `interval`, instead of the threshold: visual entries per image and layer that stay, those "
        "that a generated token has attended to most",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = (self.threshold is not None) + (self.budget is not None)
        if ways != (1 if self.interval else 0):
            raise ValueError("expected `threshold` or `budget` (one of them) with `interval`, and neither without it")
        return self


class OutputAwareCache(Stage[OutputAwareCacheOptions]):
    """After the prefill, the layers from `at` on keep only the visual tokens that the last layer with vision has.

    Layers before `at` keep theirs. Keys and values are gathered, never recomputed or rotated again.

    With `interval` (which the paper's title promises and its code lacks) each of these layers also remembers the most
    attention that any generated token has given to each visual entry, and evicts entries by it every `interval` tokens.
    Protected tokens stay.
    """

    Options = OutputAwareCacheOptions
    summary = "caches keep only the visual tokens that survived the prefill, or that the answer attends to"
    paper = "arXiv:2411.10803, decoding stage"
    example: ClassVar[Mapping[str, Any]] = {"at": 0.35}

    def __init__(self, options: OutputAwareCacheOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._first = context.scale.boundary(options.at, context.path("at"))
        self._last = context.window.exit - 1
        if self._first > self._last:
            raise PolicyError(
                f"{context.path('at')}: no visual token is left from boundary {context.window.exit} on; expected a "
                f"boundary from 0 to {self._last}"
            )
        own = range(self._first, self._last + 1)
        self._layers = tuple(layer for layer in context.scale.target.holding if layer in own)
        if not self._layers:
            raise PolicyError(
                f"{context.path('at')}: no layer from {self._first} to {self._last} makes keys, so that none holds "
                "entries; lower the boundary"
            )
        self._budget = _count(options, context)

    @property
    def decode_every(self) -> int:
        """Every token, so that none goes unseen; never without `interval`."""
        return 1 if self.options.interval else 0

    @property
    def decode_taps(self) -> tuple[int, ...]:
        """The layers that evict while decoding: those that make keys."""
        return self._layers if self.options.interval else ()

    @hookimpl
    def decode_cache(self, call: CacheCall) -> CacheKeep | None:
        """Reduce the caches to the survivors, or to what generated tokens have attended to."""
        from dropflow_mustdrop.entries import attended, survivors

        if call.step == 0:
            return CacheKeep(survivors(call, self._first, self._last))
        views = [view for view in call.layers if view.layer in self._layers]
        seen = {view.layer: attended(call, view) for view in views}
        if call.step % self.options.interval:
            return CacheKeep({}, seen)
        return CacheKeep(
            {view.layer: self._still_attended(view, seen[view.layer], call.images) for view in views}, seen
        )

    def _still_attended(
        self, view: CacheView, seen: Float[Tensor, "batch keys"], images: int
    ) -> Bool[Tensor, "batch keys"]:
        if self.options.threshold is not None:
            return seen >= self.options.threshold
        ranking = seen.masked_fill(view.protected, math.inf)
        counts = view.image_id.new_full((images,), self._budget)
        return operators.keep_top(ranking, view.image_id, counts)


def _count(options: OutputAwareCacheOptions, context: StageContext) -> int:
    """Entries per image that stay while decoding; 0 without a budget."""
    if options.budget is None:
        return 0
    path, tokens = context.path("budget"), context.scale.target.visual_tokens
    budget = context.scale.tokens(options.budget, path)
    if budget.tokens is not None:
        return budget.tokens
    if tokens is None:
        raise PolicyError(
            f"{path}: this backbone's images differ in size, so that a share is of no number; give a count"
        )
    return budget.of(tokens)
