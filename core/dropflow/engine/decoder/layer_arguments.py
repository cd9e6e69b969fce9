"""Adjusts a decoder layer's arguments, its mask and positions, to the live tokens and the layer's cache."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow.engine.decoder.site import Site
from dropflow.engine.decoder.weights import weighted_mask
from dropflow.engine.decoder.windows import within_window
from dropflow.engine.model.arguments import Arguments, hidden_of, parameters_of
from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.cache_layers import FlowLayer, UniformLayer
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.engine.tokens.masks import causal_mask, continued_mask, gather_mask, trimmed
from dropflow.engine.tokens.positions import renumbered
from dropflow.engine.tokens.restricting import TOKEN_DIMS, restrict
from dropflow.engine.tokens.shared_entries import FlowShared
from dropflow.engine.tokens.static_layers import StaticFlowLayer

Held = FlowLayer | UniformLayer | FlowShared | None
"""What the cache holds for a decoder layer; `None` where there is no cache."""
_ABSENT = object()


def _loosened(held: Held) -> bool:
    """Whether a dynamic layer stands for one of a static cache, whose masks have columns for tokens to come."""
    return isinstance(held, FlowLayer) and held.limit is not None


class Once:
    """Memoises what is computed for a run, so that layers that hold the same tokens share the result.

    A key is a word and the objects a result depends on: tensors, indices and caches are compared by identity, and the
    key keeps them alive.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[Hashable, ...], Any] = {}

    def __call__(self, key: tuple[Hashable, ...], make: Callable[[], Any]) -> Any:
        """The result for this key, computed on first use."""
        found = self._made.get(key, _ABSENT)
        if found is _ABSENT:
            found = self._made[key] = make()
        return found


class ContinuedArguments:
    """Layer arguments for a text-only call that continues a cache from which tokens are missing."""

    def __init__(self, site: Site, embeds: Float[Tensor, "batch tokens dim"]) -> None:
        self._site, self._embeds, self._once = site, embeds, Once()
        self._flash, self._windows = (
            site.flash,
            site.windows,
        )  # read once: an option of a model's config is slow to read

    def fit(self, held: FlowLayer | UniformLayer | FlowShared) -> bool:
        """Whether the model's own arguments already fit the layer."""
        if _loosened(held):
            return False  # the mask has columns for tokens that are still to come
        return held.index is None or (held.index.complete and not self._site.compact)

    def arguments(
        self, kwargs: dict[str, Any], held: FlowLayer | UniformLayer | FlowShared, number: int
    ) -> dict[str, Any]:
        """Keyword arguments of layer `number`, with the mask and the positions that its cache needs."""
        index, mask, window = held.index, kwargs.get("attention_mask"), self._windows.get(number)
        if index is None and not _loosened(held):
            return kwargs
        found = self._positions(index, kwargs) if self._site.compact and index is not None else {}
        fitted = self._once(("mask", mask, index, window), lambda: self._mask(mask, held, window))
        if fitted is not mask:
            found["attention_mask"] = fitted
        return kwargs | found if found else kwargs

    def _mask(
        self, mask: Tensor | None, held: FlowLayer | UniformLayer | FlowShared, window: int | None
    ) -> Tensor | None:
        """The mask of the layers that hold the same tokens as `held`, and whose kernel enforces the same `window`."""
        if isinstance(held, StaticFlowLayer):
            return mask if mask is None else held.mask(mask)
        index, length, tokens = held.index, held.length, self._embeds.shape[1]
        if _loosened(held):
            mask = trimmed(mask, length + tokens)
        if index is None or index.complete:
            return mask
        if mask is not None or index.valid is not None:
            mask = continued_mask(mask, index, length, tokens, flash=self._flash)
        if window is not None and tokens == 1:
            mask = within_window(mask, index, int(length) + 1, window)
        return mask

    def _positions(self, index: KeyIndex, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Compact positions, shared by layers whose caches lack the same tokens."""
        dropped = index.dropped
        if dropped is None:
            return {}
        rotary = partial(self._site.backbone.rotary, self._embeds)
        made: dict[str, Any] = self._once(
            ("positions", dropped), lambda: renumbered(kwargs, self._all(), None, dropped, rotary)
        )
        return dict(made)

    def _all(self) -> LiveSet:
        """All tokens of the call, which are live."""
        batch, tokens = self._embeds.shape[:2]
        return LiveSet.whole(batch, tokens, self._embeds.device)


@dataclass(frozen=True, eq=False)
class LayerArguments:
    """Layer arguments for one live set of a call with visual tokens, computed once for layers that hold the same."""

    site: Site
    embeds: Float[Tensor, "batch tokens dim"]
    """The decoder's input embeddings."""
    live: LiveSet
    image_id: Int[Tensor, "batch tokens"]
    """Image number of each token, encoded as in `KeyIndex`."""
    valid: Bool[Tensor, "batch tokens"]
    """False for padding in the prompt."""
    images: int
    """Number of images in the prompt."""
    dropped: Int[Tensor, "batch"] | None = None
    """Number of tokens of this call, by sample, that are not live; `None` before any is dropped."""
    log_weights: Float[Tensor, "batch tokens"] | None = None
    """Logarithm of the soft weights returned so far; 0 for tokens without one."""
    _once: Once = field(default_factory=Once, init=False)

    def moved(self, live: LiveSet, live_mask: Bool[Tensor, "batch tokens"]) -> LayerArguments:
        """The same for another live set, whose tokens are `live_mask`."""
        return replace(self, live=live, dropped=self.valid.sum(1) - live_mask.sum(1))

    def weighed(self, log_weights: Float[Tensor, "batch tokens"] | None) -> LayerArguments:
        """The same with the soft weights of one more boundary multiplied in."""
        if log_weights is None or not log_weights.requires_grad:
            return self
        return replace(self, log_weights=log_weights if self.log_weights is None else self.log_weights + log_weights)

    def keys(self, held: Held) -> KeyIndex:
        """Index of what the layer's cache will hold after this call, shared by layers that hold the same."""
        index, length = (None, 0) if held is None else (held.index, held.length)
        past = self._once(("past", index, int(length)), lambda: self._past(held))
        keys: KeyIndex = self._once(
            ("keys", past), lambda: past.followed_by(self.live, self.image_id, self.dropped, self.images)
        )
        return keys

    def arguments(
        self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], held: Held, keys: KeyIndex
    ) -> Arguments:
        """All arguments of `layer` except hidden states and cache, adjusted to the live tokens and `keys`."""
        positions = self._positions(held, kwargs)
        mask = kwargs.get("attention_mask")
        if not (keys.complete and self.live.everything):
            gathered = self._once(
                ("mask", mask, keys), lambda: gather_mask(mask, self.live, keys, flash=self.site.flash)
            )
            kwargs = kwargs | {"attention_mask": gathered}
        elif _loosened(held):
            kwargs = kwargs | {"attention_mask": self._once(("trimmed", mask, keys), lambda: trimmed(mask, len(keys)))}
        if self.log_weights is not None:
            fitted, weights, dtype = kwargs.get("attention_mask"), self.log_weights, hidden_of(args, kwargs).dtype
            weighted = self._once(("weights", fitted, keys), lambda: self._weighted(fitted, weights, keys, dtype))
            kwargs = kwargs | {"attention_mask": weighted}
        args, kwargs = self.restricted(layer, args, {k: v for k, v in kwargs.items() if k not in positions})
        return args, kwargs | positions

    def restricted(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """All arguments of `layer` except hidden states, cache and mask, restricted to the live tokens."""
        if self.live.everything:
            return args, kwargs
        names = parameters_of(layer)
        args = (*args[:1], *(self._restricted(*one) for one in zip(names[1:], args[1:], strict=False)))
        return args, {name: self._restricted(name, value) for name, value in kwargs.items()}

    def _positions(self, held: Held, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Position arguments for compact positions, shared by layers whose caches lack the same tokens."""
        if not self.site.compact:
            return {}
        rotary = partial(self.site.backbone.rotary, self.embeds)
        index = None if held is None else held.index
        if index is not None and index.ahead:  # tokens of this call, which stand before the live ones
            ranked: dict[str, Any] = self._once(
                ("positions", index),
                lambda: renumbered(kwargs, self.live, self.valid, None, rotary, before=len(index)),
            )
            return ranked
        dropped = None if index is None else index.dropped
        if dropped is None and self.live.everything:
            return {}
        found: dict[str, Any] = self._once(
            ("positions", dropped), lambda: renumbered(kwargs, self.live, self.valid, dropped, rotary)
        )
        return found

    def _past(self, held: Held) -> KeyIndex:
        index = self.live.index
        if held is not None and held.index is not None and held.index.ahead:
            return held.index
        return held.full_index() if held is not None and held.length else KeyIndex.plain(len(index), 0, index.device)

    def _weighted(self, mask: Tensor | None, log_weights: Tensor, keys: KeyIndex, dtype: torch.dtype) -> Tensor:
        """The layer's mask for `keys`, with the soft weights of the live tokens; entries of earlier turns have none."""
        with torch.enable_grad():  # the first caller may be a stage that ranks without gradients
            log_weights = self.live.take(log_weights)
            own = torch.nn.functional.pad(log_weights, (len(keys) - log_weights.shape[1], 0))
            return weighted_mask(causal_mask(self.live, keys) if mask is None else mask, own, dtype)

    def _restricted(self, name: str, value: Any) -> Any:
        known = self.site.backbone.token_arguments
        if (name not in TOKEN_DIMS and name not in known) or not isinstance(value, Tensor | tuple | list):
            return value
        key = tuple(value) if isinstance(value, list) else value
        return self._once(("value", name, key), lambda: restrict(name, value, self.live, known))
