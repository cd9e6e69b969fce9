"""What each layer's cache held after every forward since a prompt, counted only when it changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.holdings import Holdings


@dataclass(frozen=True)
class Held:
    """Tokens that each layer's cache held at one moment; padding is not counted."""

    rows: int
    """Samples of the batch, which the numbers below are summed over."""
    entries: tuple[int, ...]
    """By layer."""
    visual: tuple[int, ...]
    """Those that are visual."""
    dense: int
    """Of one layer, had nothing been dropped or evicted."""

    def after(self, tokens: int) -> Held:
        """The same with so many text tokens more in every layer."""
        more = tokens * self.rows
        return Held(self.rows, tuple(held + more for held in self.entries), self.visual, self.dense + more)


class KVHistory:
    """What the caches held, from a prompt on.

    A token that is appended adds one entry to every layer. So a forward that evicts nothing is noted by a number; what
    layers hold is counted, as tensors, when their indices are replaced, and read when somebody asks.
    """

    def __init__(self, indices: Sequence[KeyIndex], length: int) -> None:
        """`indices` are those of the layers after the prompt, of `length` logical tokens."""
        self._indices, self._since = tuple(indices), length
        self._counted: list[_Counted] = []
        self._lengths = [length]
        self._starts = [0]
        """Number of the forward from which each state holds; the last one is not counted yet."""

    @property
    def length(self) -> int:
        """Logical tokens seen after the last forward."""
        return self._lengths[-1]

    def note(self, indices: Sequence[KeyIndex], length: int) -> None:
        """Take what the layers hold after one forward more."""
        indices = tuple(indices)
        if indices != self._indices:
            self._counted.append(self._count())
            self._starts.append(len(self._lengths))
            self._indices, self._since = indices, length
        self._lengths.append(length)

    def moments(self) -> list[Held]:
        """After each forward; the first is the prompt."""
        states = [(one.held(), one.length) for one in (*self._counted, self._count())]
        found = []
        for (held, since), (start, end) in zip(states, pairwise([*self._starts, len(self._lengths)]), strict=True):
            found += [held.after(length - since) for length in self._lengths[start:end]]
        return found

    def _count(self) -> _Counted:
        held = Holdings.of(self._indices, self._since)
        return _Counted(self._since, len(held.dense), held.entries.sum(1), held.visual.sum(1), held.dense.sum())


def held_with(indices: Sequence[KeyIndex], length: int) -> Held:
    """What layers with these indices hold once they have seen `length` logical tokens."""
    (found,) = KVHistory(indices, length).moments()
    return found


@dataclass(frozen=True, eq=False)
class _Counted:
    """A moment, still on the device."""

    length: int
    rows: int
    entries: Tensor
    visual: Tensor
    dense: Tensor

    def held(self) -> Held:
        return Held(self.rows, tuple(self.entries.tolist()), tuple(self.visual.tolist()), int(self.dense))
