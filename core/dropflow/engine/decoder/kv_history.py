"""What each layer's cache held after every forward since a prompt, counted only when the cache indices change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.holdings import Holdings


@dataclass(frozen=True)
class Held:
    """Number of tokens that each layer's cache held at one moment, excluding padding."""

    rows: int
    """Samples in the batch, over which the numbers below are summed."""
    entries: tuple[int, ...]
    """Entries of each layer."""
    visual: tuple[int, ...]
    """Visual entries of each layer."""
    dense: int
    """Entries one layer would hold had nothing been dropped or evicted."""

    def after(self, tokens: int) -> Held:
        """The same with `tokens` more text tokens in every layer."""
        more = tokens * self.rows
        return Held(self.rows, tuple(held + more for held in self.entries), self.visual, self.dense + more)


@dataclass(frozen=True)
class Attended:
    """Number of tokens that each layer attended to in one forward, as means over its samples, padding excluded."""

    entries: tuple[float, ...]
    """All tokens, those of the forward included."""
    visual: tuple[float, ...]
    """Visual tokens."""


class KVHistory:
    """What the caches held from the end of a prompt on.

    An appended token adds one entry to every layer, so a forward that evicts nothing is recorded as a number. What the
    layers hold is counted, as tensors, only when their indices are replaced, and read from the device on request.
    """

    def __init__(self, indices: Sequence[KeyIndex], length: int) -> None:
        """`indices` are those of the layers after the prompt, which has `length` logical tokens."""
        self._indices, self._since = tuple(indices), length
        self._counted: list[_Counted] = []
        self._lengths = [length]
        self._read: list[Mapping[int, Tensor]] = []
        """For each later forward, layers (numbered as the indices) that did not read all they held: what they read."""
        self._starts = [0]
        """Number of the forward from which each state applies; the last state is not counted yet."""

    @property
    def length(self) -> int:
        """Logical tokens seen after the last forward."""
        return self._lengths[-1]

    def note(self, indices: Sequence[KeyIndex], length: int, read: Mapping[int, Tensor] | None = None) -> None:
        """Record what the layers hold after one more forward.

        `read` are the numbers of entries, and of visual ones, (2, batch) that layers read which did not read all.
        """
        indices = tuple(indices)
        self._read.append(read or {})
        if indices != self._indices:
            self._counted.append(self._count())
            self._starts.append(len(self._lengths))
            self._indices, self._since = indices, length
        self._lengths.append(length)

    def append(self, length: int) -> None:
        """Record one more forward by whose end `length` logical tokens were seen, which evicted nothing."""
        self.note(self._indices, length)

    def forget(self, tokens: int) -> None:
        """Take back the last forwards, of `tokens` in all, between which no state changed: they were not on this cache.

        They are those of one token that have run on a static cache since it was emptied, which only its device knew.
        """
        while tokens > 0 and len(self._lengths) > 1:
            tokens -= self._lengths[-1] - self._lengths[-2]
            self._lengths.pop()
            self._read.pop()

    def moments(self) -> list[Held]:
        """What was held after each forward; the first is the prompt."""
        states = [(one.held(), one.length) for one in (*self._counted, self._count())]
        found = []
        for (held, since), (start, end) in zip(states, pairwise([*self._starts, len(self._lengths)]), strict=True):
            found += [held.after(length - since) for length in self._lengths[start:end]]
        return found

    def attended(self) -> list[Attended]:
        """What the layers attended to in each forward after the prompt."""
        found, means = [], dict[Tensor, list[float]]()
        for held, (start, end), read in zip(self.moments(), pairwise(self._lengths), self._read, strict=False):
            for counts in read.values():
                if counts not in means:
                    means[counts] = counts.double().mean(1).tolist()
            own, more = {layer: means[counts] for layer, counts in read.items()}, max(end - start, 0)
            entries = tuple(own[n][0] if n in own else one / held.rows + more for n, one in enumerate(held.entries))
            visual = tuple(own[n][1] if n in own else one / held.rows for n, one in enumerate(held.visual))
            found.append(Attended(entries, visual))
        return found

    def _count(self) -> _Counted:
        held = Holdings.of(self._indices, self._since)
        return _Counted(self._since, len(held.dense), held.entries.sum(1), held.visual.sum(1), held.dense.sum())


def held_with(indices: Sequence[KeyIndex], length: int) -> Held:
    """What layers with these indices hold after `length` logical tokens."""
    (found,) = KVHistory(indices, length).moments()
    return found


@dataclass(frozen=True, eq=False)
class _Counted:
    """The counts of one moment, still on the device."""

    length: int
    rows: int
    entries: Tensor
    visual: Tensor
    dense: Tensor

    def held(self) -> Held:
        return Held(self.rows, tuple(self.entries.tolist()), tuple(self.visual.tolist()), int(self.dense))
