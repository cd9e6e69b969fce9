"""The live set: which logical tokens are present before a layer, and in which slot each of them is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow.engine.tokens.host import Extent
from dropflow.lifecycle.lazy import lazy


def after_past(past: int, slots: Int[Tensor, "batch slots"]) -> Int[Tensor, "batch keys"]:
    """Columns of the `past` keys that a cache held before a call, then those of the call's keys in `slots`."""
    before = torch.arange(past, device=slots.device).expand(len(slots), -1)
    return torch.cat((before, past + slots), 1)


def rows_of(
    states: Float[Tensor, "batch rows dim"], index: Int[Tensor, "batch picked"]
) -> Float[Tensor, "batch picked dim"]:
    """The rows of states that `index` selects for each sample, copied whole: `gather` would copy number by number.

    They are no view of anything, on which compiled layers would be specialised.
    """
    index = index.to(states.device)
    if len(states) == 1:
        return states.index_select(1, index[0])
    return states[torch.arange(len(states), device=index.device)[:, None], index]


def picked(
    states: Float[Tensor, "batch heads rows dim"], index: Int[Tensor, "batch picked"]
) -> Float[Tensor, "batch heads picked dim"]:
    """The rows of q, k or v that `index` selects for each sample, in its order."""
    if len(states) == 1:
        return states.index_select(2, index[0].to(states.device))
    take = index.to(states.device)[:, None, :, None]
    return states.gather(2, take.expand(-1, states.shape[1], -1, states.shape[3]))


@dataclass(frozen=True, eq=False)
class LiveSet:
    """The tokens of one call that are live before a sequence of layers, right-aligned in each sample.

    The slots of a sample hold its live tokens in their original order. Samples with fewer live tokens than the longest
    one have padding slots on the left, so that the last token of every sample stays last.
    """

    index: Int[Tensor, "batch slots"]
    """Logical index of the token in each slot; padding slots repeat some index."""
    valid: Bool[Tensor, "batch slots"] | None
    """False in padding slots; `None` if there are none."""
    total: int
    """T, the number of logical tokens of the call."""
    everything: bool = False
    """True if every logical token, including padding, is in its own slot because nothing has been dropped yet."""

    @classmethod
    def whole(cls, batch: int, total: int, device: torch.device) -> LiveSet:
        """All T tokens of the call, in place."""
        return cls(torch.arange(total, device=device).expand(batch, -1), None, total, everything=True)

    @classmethod
    def of(cls, live: Bool[Tensor, "batch tokens"], extent: Extent | None = None) -> LiveSet:
        """Compact the tokens where `live` is true; one host synchronisation where its `extent` is not known."""
        low, high, _ = Extent.read(live) if extent is None else extent
        slots = max(high, 1)
        # a stable sort of booleans puts the live tokens last, in order
        index = torch.argsort(live.to(torch.uint8), dim=1, stable=True)[:, live.shape[1] - slots :]
        valid = None if low == slots else live.gather(1, index)
        return cls(index, valid, live.shape[1])

    @property
    def slots(self) -> int:
        """M, the number of slots per sample."""
        return self.index.shape[1]

    @property
    def filled(self) -> Bool[Tensor, "batch slots"]:
        """False in padding slots; never `None`."""
        return torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid

    @lazy
    def slot(self) -> Int[Tensor, "batch tokens"]:
        """Slot of the last live token at or before each logical token; -1 where there is none."""
        batch, slots = self.index.shape
        if self.everything:
            return self.index
        here = torch.zeros(batch, self.total, dtype=torch.long, device=self.index.device)
        here.scatter_add_(1, self.index, self.filled.long())
        seen = here.cumsum(1)
        return torch.where(seen > 0, seen - 1 + slots - seen[:, -1:], -1)

    def take(self, per_token: Tensor) -> Tensor:
        """Values (batch, tokens, ...) of the tokens in each slot."""
        index = self.index.view(*self.index.shape, *[1] * (per_token.dim() - 2)).to(per_token.device)
        return per_token.gather(1, index.expand(-1, -1, *per_token.shape[2:]))

    def restricted(self, kept: LiveSet) -> LiveSet:
        """The same with only the slots in `kept`, a live set over these slots."""
        valid = None if self.valid is None else kept.take(self.valid)
        if kept.valid is not None:
            valid = kept.valid if valid is None else valid & kept.valid
        return LiveSet(kept.take(self.index), valid, self.total)

    def slots_of(self, now: LiveSet) -> Int[Tensor, "batch slots"]:
        """The slots here of the tokens in the slots of `now`, a later live set of the same call."""
        return self.slot.gather(1, now.index).clamp(min=0)

    def to_tokens(self, slots: Int[Tensor, "batch slots"]) -> Int[Tensor, "batch tokens"]:
        """Translate a map between slots into one between tokens; tokens without a slot map to themselves."""
        own = torch.arange(self.total, device=slots.device).repeat(len(slots), 1)
        return own.scatter_(1, self.index, self.index.gather(1, slots))

    def restrict(
        self, previous: LiveSet, states: Float[Tensor, "*streams batch slots dim"], raw: Tensor | None
    ) -> Tensor:
        """Move states from the slots of `previous` to the slots of this set.

        With `raw` (*streams, batch, tokens, dim), tokens that were not live before enter with their untransformed row
        of it; without `raw`, this set must be a subset of `previous`.
        """
        if states.dim() > 3:
            rows = [None] * len(states) if raw is None else list(raw)
            return torch.stack([self.restrict(previous, *stream) for stream in zip(states, rows, strict=True)])
        source = previous.slot.gather(1, self.index).to(states.device)
        if raw is not None:
            held = previous.index if previous.valid is None else torch.where(previous.valid, previous.index, -1)
            slot = source.to(held.device)
            present = (held.gather(1, slot.clamp(min=0)) == self.index) & (slot >= 0)
            source = torch.where(present.to(source.device), source, self.index.to(source.device) + previous.slots)
            states = torch.cat((states, raw.to(states)), dim=1)
        return rows_of(states, source.clamp(min=0))

    def expand(self, states: Float[Tensor, "batch slots dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Expand states to T tokens: each reads the last live token at or before it, or zeros if there is none."""
        if self.everything:
            return states
        slot = self.slot.to(states.device)
        return rows_of(states, slot.clamp(min=0)).masked_fill_((slot < 0)[:, :, None], 0)
