"""q and k of a decoder layer as it ran, for stages that ask about it later, when other tokens may be live."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from dropflow.engine.model.attention import QueryKey, row_attention, row_bias
from dropflow.engine.tokens.live_set import LiveSet, after_past


@dataclass(frozen=True, eq=False)
class TappedLayer:
    """The inputs of one layer's attention and the tokens it ran on."""

    seen: QueryKey
    """Queries are those of the call; keys are those in the layer's cache before the call, then those of the call."""
    live: LiveSet | None
    """Tokens of the call that were live in the layer; `None` for all."""

    def of_tokens(self, rows: Int[Tensor, "batch rows"]) -> Float[Tensor, "batch heads rows keys"]:
        """Attention rows of tokens of the call, given by their number in it.

        A token that was not live in the layer gets the row of the last live token before it.
        """
        slots = rows if self.live is None else self.live.slot.gather(1, rows.to(self.live.index.device)).clamp(min=0)
        return row_attention(self.seen, slots)

    def of_slots(self, slots: Int[Tensor, "batch rows"], now: LiveSet) -> Float[Tensor, "batch heads rows keys"]:
        """Attention rows of slots of `now`, a subset of what was live; keys are those of the cache, then of `now`."""
        if self.live is None or now is self.live:
            return row_attention(self.seen, slots)
        source = self.live.slots_of(now)
        rows = row_attention(self.seen, source.gather(1, slots.to(source.device)))
        return _taken(rows, 3, self._columns(source).to(rows.device))

    def on(self, now: LiveSet) -> QueryKey:
        """q and k of only the slots of `now`, and the keys that the cache held."""
        if self.live is None or now is self.live:
            return self.seen
        seen, source = self.seen, self.live.slots_of(now)
        rows = source.to(seen.query.device)
        columns = self._columns(source).to(seen.key.device)
        mask = seen.mask if seen.mask is None or seen.mask.dim() == 2 else row_bias(seen, rows)
        if mask is not None:
            mask = _taken(mask, -1, columns)
        return replace(
            seen,
            query=_taken(seen.query, 2, rows),
            key=_taken(seen.key, 2, columns),
            value=None if seen.value is None else _taken(seen.value, 2, columns),
            mask=mask,
            rotary=_rotary(seen.rotary, rows),
        )

    def _columns(self, source: Int[Tensor, "batch slots"]) -> Int[Tensor, "batch keys"]:
        """Columns of the keys in the cache before the call, then those of the slots in `source`."""
        return after_past(self.seen.key.shape[2] - self.seen.query.shape[2], source)


def _rotary(rotary: Any, rows: Int[Tensor, "batch slots"]) -> Any:
    """cos and sin (batch or 1, tokens, dims) of the tokens in `rows`; anything else is returned unchanged."""
    if not isinstance(rotary, tuple) or any(part.dim() != 3 for part in rotary):
        return rotary
    return tuple(_taken(part.expand(len(rows), -1, -1), 1, rows.to(part.device)) for part in rotary)


def _taken(values: Tensor, dim: int, index: Int[Tensor, "batch picked"]) -> Tensor:
    """The entries along `dim` that `index` selects for each sample."""
    dim %= values.dim()
    shape = [1] * values.dim()
    shape[0], shape[dim] = index.shape
    whole = values.expand(len(index), *values.shape[1:])
    sizes = list(whole.shape)
    sizes[dim] = index.shape[1]
    return whole.gather(dim, index.view(shape).expand(sizes))
