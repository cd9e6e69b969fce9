"""Cache layers of fixed size, each with a capacity of its own; compiled decode steps run inside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from dropflow.backbone.compiling import is_traced
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.cache_layers import FlowLayer, UniformLayer
from dropflow.errors import UnsupportedCall

STRIDE = 64
"""Capacities differ by a multiple of this many entries, so that prompts of similar size share compiled code."""


class StaticFlowLayer(UniformLayer):
    """A static layer that holds what is left of a prompt, with room for all tokens that the cache may still see.

    Towards the model it has the size that was asked of the cache, `limit` logical tokens. Its own tensors, as large as
    what it holds and may still get, never change their shape or place, and neither do `columns` and `shown`, by which a
    step's mask is reduced to them. Nothing that a step calls here asks for a value on the host.
    """

    is_compileable = True
    is_initialized = True
    columns: Tensor
    """Mask column of each entry (batch, 1, 1, capacity); any column where it is not `shown`."""
    shown: Tensor
    """False (batch, 1, 1, capacity) for entries of padding and beyond the limit."""
    lag: Tensor
    """Number of logical tokens (a scalar) that no entry holds."""
    dropped: Tensor | None
    """By how much positions are compact (batch,): the tokens of each sample that no entry holds; `None` for persistent
    positions."""
    whole: bool
    """Whether every logical token has the entry of its own position, so that the model's mask fits as it is."""
    traced_by: Any
    """The attached policy whose compiled steps need no more of the engine than this layer's mask; `None` for none."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # nor is it compiled where graphs break
    def __init__(
        self, layer: FlowLayer, index: KeyIndex, limit: int, traced_by: Any = None, *, compact: bool = False
    ) -> None:
        """Take over what `layer` holds, of which `index` describes the first entries.

        `compact` tells how positions are numbered.
        """
        missing, held = index.length - len(index), layer.keys.shape[-2]
        inner = StaticLayer(max_cache_len=limit - missing // STRIDE * STRIDE)
        inner.lazy_initialization(layer.keys, layer.values)
        inner.keys.narrow(-2, 0, held).copy_(layer.keys)
        inner.values.narrow(-2, 0, held).copy_(layer.values)
        inner.cumulative_length.add_(held)
        super().__init__(inner, layer.written_by)
        self.limit, self.traced_by = limit, traced_by
        self._sliding, self._compact = layer.is_sliding, compact
        self.index, self.prompt = index, layer.prompt
        self.begun_with, self.uncounted = layer.begun_with, layer.uncounted
        self._lay_out()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _lay_out(self) -> None:
        """Make what is derived from the index."""
        index, keys = self.index, self.inner.keys
        assert index is not None
        # tensors of its own, as compiled code depends on which layers share some
        self.columns, self.shown = (place.clone() for place in index.places(self.limit, keys.shape[-2]))
        self.lag = torch.tensor(index.length - len(index), device=keys.device)
        self.whole, self.dropped = index.complete, None
        if self._compact:
            self.dropped = self.lag.new_zeros(len(keys)) if index.dropped is None else index.dropped.clone()
        for fixed in (self.columns, self.shown, self.lag, self.dropped):
            if fixed is not None:
                torch._dynamo.mark_static_address(fixed)

    def vary(self) -> None:
        """Let code that is compiled for this layer serve others of any capacity."""
        for held, dim in ((self.keys, 2), (self.values, 2), (self.columns, 3), (self.shown, 3)):
            torch._dynamo.maybe_mark_dynamic(held, dim)

    def dynamic(self) -> FlowLayer:
        """The same entries in a layer that grows; one host synchronisation."""
        index = self.full_index()
        found = FlowLayer(self._sliding, self.written_by, self.limit)
        found.begun_with, found.uncounted = self.begun_with, self.uncounted
        if not len(index):
            return found
        keys, values = (held.narrow(-2, 0, len(index)) for held in (self.keys, self.values))
        found.lazy_initialization(keys, values)
        found.keys, found.values, found.prompt = keys, values, self.prompt
        found.index = None if self.written_by is None else index
        return found

    @property
    def entries(self) -> Tensor:
        """Number of entries held, a scalar on the layer's device that changes in place."""
        held: Tensor = self.inner.cumulative_length
        return held

    @property
    def length(self) -> Any:
        """Number of logical tokens seen, a scalar tensor on the layer's device."""
        return self.entries + self.lag

    def get_seq_length(self) -> Any:
        """Logical tokens seen."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        """The limit: masks have a column for every token that the cache may see."""
        self._check_read()
        return self.limit, 0

    def _check_read(self) -> None:
        """Refuse to be read by anything but a call under the policy; a step that is compiled for it passes at once."""
        if self.written_by is not None and (self.traced_by is None or not self.traced_by.step.open):
            self._check_served()

    def get_max_length(self) -> int:
        """The limit."""
        return self.limit

    @property
    def max_cache_len(self) -> int:
        """The limit, by the name of transformers' static layers."""
        return self.limit

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Write new keys and values in place; returns the layer's whole tensors, with what is still empty.

        Raises `UnsupportedCall` beyond the limit. Where that would take a host synchronisation, torch's own error of
        an index out of range comes instead, as from transformers' static layers.
        """
        if not is_traced():
            self._check_read()  # a mask that `generate` made does not ask for its size again
        inner, more = self.inner, key_states.shape[-2]
        held, capacity = inner.cumulative_length, inner.keys.shape[-2]
        places = torch.arange(more, device=held.device) + held
        here = held.device.type == "cpu" and not is_traced()
        if here and int(places[-1] + self.lag) >= self.limit:
            raise UnsupportedCall(
                f"{CACHE_ARGUMENT}: a static cache of {self.limit} tokens is full; make it with a larger max_cache_len"
            )
        places = torch.where(places + self.lag < self.limit, places, capacity)
        for stored, new in ((inner.keys, key_states), (inner.values, value_states)):
            stored.index_copy_(2, places, new)
        held.add_(more)
        return inner.keys, inner.values

    def mask(self, mask: Tensor) -> Tensor:
        """The model's mask (batch or 1, heads or 1, queries, limit), reduced to the places of this layer's entries."""
        if not is_traced() and self.whole:  # compiled code does not depend on what layers hold
            return mask
        columns, shown = self.columns.to(mask.device), self.shown.to(mask.device)
        mask = mask.expand(columns.shape[0], -1, -1, -1)
        columns = columns.expand(-1, mask.shape[1], mask.shape[2], -1)
        held = mask.gather(3, columns)
        if held.dtype == torch.bool:
            return held & shown
        return held.masked_fill(~shown, torch.finfo(held.dtype).min)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder samples, as in beam search."""
        super().reorder_cache(beam_idx)
        if self.uncounted is not None:
            self.uncounted = self.uncounted[beam_idx.to(self.uncounted.device)]
        self._lay_out()

    def crop(self, tokens_to_remove: int) -> None:  # noqa: ARG002
        """Raises `UnsupportedCall`, as do the other operations that would change the size of its tensors."""
        self._refuse("crop")

    def batch_select_indices(self, indices: Tensor) -> None:  # noqa: ARG002
        """Raises `UnsupportedCall`."""
        self._refuse("batch_select_indices")

    def batch_repeat_interleave(self, repeats: int) -> None:  # noqa: ARG002
        """Raises `UnsupportedCall`."""
        self._refuse("batch_repeat_interleave")

    def _refuse(self, what: str) -> None:
        raise UnsupportedCall(
            f"{CACHE_ARGUMENT}: {what} would change the size of a static cache; use a plain DynamicCache"
        )

    def reset(self) -> None:
        """Forget everything, the policy too; all tokens find room again."""
        inner = StaticLayer(max_cache_len=self.limit)
        inner.lazy_initialization(self.keys, self.values)
        self.inner, self.prompt, self.written_by = inner, 0, None
        self.begun_with, self.uncounted = None, None
        self.index = KeyIndex.plain(inner.keys.shape[0], 0, inner.keys.device)
        self._lay_out()
