"""Keys that several decoder layers share: each sees those of its own live tokens, whichever layer made them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from dropflow.engine.decoder.layer_arguments import LayerArguments, Once
from dropflow.engine.decoder.site import Site
from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.live_set import LiveSet, after_past, picked
from dropflow.engine.tokens.restricting import SHARED_KEYS
from dropflow.engine.tokens.shared_entries import FlowShared
from dropflow.errors import UnsupportedModel


class SharedKeys:
    """The tokens on which the layers that make shared keys ran in one call, and what of them other layers see.

    A layer that shares keys gets those of the earlier turns and of its own live tokens, so that its mask and its
    attention rows are those of a layer that made them itself. The cache keeps every key that was made, and records for
    each such layer which of them it sees.
    """

    def __init__(self, site: Site) -> None:
        self._producers = dict(site.plan.shape.producers)
        self._kinds = [mixer.name for mixer in site.backbone.mixers] if self._producers else []
        self._made: dict[int, LayerArguments] = {}
        self._once = Once()

    def note_made(self, number: int, arguments: LayerArguments) -> None:
        """Record on which tokens a layer ran, if others share its keys."""
        if number in self._producers.values():
            self._made[number] = arguments

    def restricted(self, number: int, kwargs: dict[str, Any], live: LiveSet) -> dict[str, Any]:
        """Keyword arguments of a layer, in which the keys and values that it shares are those of `live` tokens."""
        producer = self._producers.get(number)
        if producer is None or self._made[producer].live is live:
            return kwargs
        made = self._made[producer].live
        return self._instead(number, kwargs, live, lambda states: _taken(states, made, live))

    def reordered(self, number: int, kwargs: dict[str, Any], made: KeyIndex, keys: KeyIndex) -> dict[str, Any]:
        """The same with the entries of `keys`, of those that `made` describes, in which the layer that made them ran
        on fewer tokens than the call has."""
        if made is keys:
            return kwargs
        order = self._once(("order", made, keys), lambda: made.entries_of(keys.logical, keys.length))
        return self._instead(number, kwargs, order, lambda states: picked(states, order))

    def _instead(
        self, number: int, kwargs: dict[str, Any], which: Hashable, take: Callable[[Tensor], Tensor]
    ) -> dict[str, Any]:
        """Keyword arguments of a layer with what `take` makes of the keys and values it shares, as `which` says."""
        producer = self._producers[number]
        shared = kwargs.get(SHARED_KEYS)
        kind = self._kinds[number]
        name = kind if shared is not None and kind in shared else producer  # up to transformers 5.20, a number
        if shared is None or name not in shared:
            raise UnsupportedModel(
                f"layer {number}: shares the keys of layer {producer}, but does not receive them as `{SHARED_KEYS}`; "
                "use a version of transformers that dropflow is tested with"
            )
        taken = self._once(("keys", *shared[name], which), lambda: tuple(take(one) for one in shared[name]))
        return kwargs | {SHARED_KEYS: type(shared)({**shared, name: taken})}

    def note_seen(self, number: int, held: FlowShared, live: LiveSet, live_mask: Bool[Tensor, "batch tokens"]) -> None:
        """Record in the cache which of the entries a layer that shares them sees; call it after the layer ran."""
        made = self._made[self._producers[number]]
        index = made.keys(held)
        if made.live is not live:
            index = self._once(
                ("seen", index, live), lambda: index.narrowed(live_mask.gather(1, made.live.index.to(live_mask.device)))
            )
        if index is not held.layer.index:
            held.layer.shared[number] = index


def _taken(states: Tensor, made: LiveSet, live: LiveSet) -> Tensor:
    """Keys or values (batch, kv_heads, keys, dim) of earlier turns, and of the tokens that are `live`."""
    columns = after_past(states.shape[2] - made.slots, made.slots_of(live))
    return picked(states, columns)
