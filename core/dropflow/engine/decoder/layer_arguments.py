"""Fits the arguments of a decoder layer, its mask and positions, to what is live and what the layer's cache holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow.engine.decoder.probe import Arguments, hidden_of
from dropflow.engine.decoder.weights import weighted_mask
from dropflow.engine.tokens.cache import FlowLayer
from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.engine.tokens.masks import OWN_WAY, causal_mask, gather_mask, restrict_argument
from dropflow.engine.tokens.positions import renumbered


@dataclass(frozen=True, eq=False)
class LayerArguments:
    """One live set of a call; what layers that hold the same need is computed for the first of them, and kept."""

    live: LiveSet
    image_id: Int[Tensor, "batch tokens"]
    """Image number of each token, as a `KeyIndex` notes it."""
    valid: Bool[Tensor, "batch tokens"] | None
    """False for padding of the prompt that is read; `None` where a call reads none."""
    flash: bool
    """Whether the attention implementation takes masks of two dimensions."""
    rotary: Callable[[Tensor], Any] | None
    """Makes position embeddings for ids (batch, slots), where positions are compact; `None` where they persist."""
    dropped: Int[Tensor, "batch"] | None = None
    """Tokens of this call, by sample, that are not live; counted for compact positions only."""
    log_weights: Float[Tensor, "batch tokens"] | None = None
    """Logarithm of the soft weights that stages gave so far; 0 where there is none."""
    _made: dict[tuple[Any, ...], tuple[Any, Any]] = field(default_factory=dict, init=False)

    def moved(self, live: LiveSet, live_mask: Bool[Tensor, "batch tokens"]) -> LayerArguments:
        """For another live set, of the tokens `live_mask`."""
        dropped = None if self.rotary is None or self.valid is None else self.valid.sum(1) - live_mask.sum(1)
        return replace(self, live=live, dropped=dropped)

    def weighed(self, log_weights: Float[Tensor, "batch tokens"] | None) -> LayerArguments:
        """With the soft weights of one more boundary, which multiply those of the ones before."""
        if log_weights is None or not log_weights.requires_grad:
            return self
        return replace(self, log_weights=log_weights if self.log_weights is None else self.log_weights + log_weights)

    def suits(self, held: FlowLayer | None, kwargs: Mapping[str, Any]) -> bool:
        """Whether the model's own mask fits what the layer's cache holds, as in decoding without padding."""
        index = None if held is None else held.index
        return index is None or (
            index.valid is None and (len(index) == index.length or kwargs["attention_mask"] is None)
        )

    def keys(self, held: FlowLayer | None) -> KeyIndex:
        """What the layer's cache will hold after this call; shared by layers that hold the same."""
        index = None if held is None else held.index
        length = 0 if held is None else held.length
        past = self._once(("past", id(index), length), index, lambda: self._past(held))
        keys: KeyIndex = self._once(
            ("keys", id(past)), past, lambda: past.followed_by(self.live, self.image_id, self.dropped)
        )
        return keys

    def arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], held: FlowLayer | None, keys: KeyIndex
    ) -> Arguments:
        """All arguments but hidden states and cache, as the live tokens and `keys` need them."""
        positions = self.positions(held, kwargs)
        mask = kwargs.get("attention_mask")
        if not keys.complete:
            make = lambda: gather_mask(mask, self.live, keys, flash=self.flash)  # noqa: E731
            kwargs = kwargs | {"attention_mask": self._once(("mask", id(mask), id(keys)), (mask, keys), make)}
        if self.log_weights is not None:
            fitted, weights, dtype = kwargs.get("attention_mask"), self.log_weights, hidden_of(args, kwargs).dtype
            make = lambda: self._weighted(fitted, weights, keys, dtype)  # noqa: E731
            kwargs = kwargs | {"attention_mask": self._once(("weights", id(fitted), id(keys)), (fitted, keys), make)}
        if self.live.everything:
            return args, kwargs | positions
        kwargs = {k: v if k in OWN_WAY or k in positions else self._restricted(v) for k, v in kwargs.items()}
        return (*args[:1], *(self._restricted(value) for value in args[1:])), kwargs | positions

    def positions(self, held: FlowLayer | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Position arguments that compact positions replace; shared by layers whose caches lack the same tokens."""
        rotary = self.rotary
        if rotary is None:
            return {}
        dropped = None if held is None or held.index is None else held.index.dropped
        if dropped is None and self.live.everything:
            return {}
        found: dict[str, Any] = self._once(
            ("positions", id(dropped)),
            (dropped, kwargs),
            lambda: renumbered(kwargs, self.live, self.valid, dropped, rotary),
        )
        return found

    def _past(self, held: FlowLayer | None) -> KeyIndex:
        index = self.live.index
        return held.full_index() if held is not None and held.length else KeyIndex.plain(len(index), 0, index.device)

    def _weighted(self, mask: Tensor | None, log_weights: Tensor, keys: KeyIndex, dtype: torch.dtype) -> Tensor:
        """The layer's mask, made for `keys`, with the soft weights of the live tokens; earlier turns have none."""
        with torch.enable_grad():  # a stage that ranks without gradients may be the first to ask
            log_weights = self.live.take(log_weights)
            own = torch.nn.functional.pad(log_weights, (len(keys) - log_weights.shape[1], 0))
            return weighted_mask(causal_mask(self.live, keys) if mask is None else mask, own, dtype)

    def _restricted(self, value: Any) -> Any:
        if not isinstance(value, Tensor | tuple | list):
            return value
        return self._once(("value", id(value)), value, lambda: restrict_argument(value, self.live))

    def _once(self, key: tuple[Any, ...], source: Any, make: Callable[[], Any]) -> Any:
        """What `make` gave for this key before; `source` is kept alive, as its id is part of the key."""
        if key not in self._made:
            self._made[key] = (source, make())
        return self._made[key][1]
