"""What callers state for the calls of their thread: which tokens are visual, and which policy of a set counts."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")


class Stated(Generic[T]):
    """A value for each of several owners, for this thread, inside a block; blocks may be nested.

    It counts as long as its block exists, so that one whose end an interrupt has cut short states nothing any more.
    """

    def __init__(self, name: str) -> None:
        self._blocks: ContextVar[tuple[weakref.ref[_Block[T]], ...]] = ContextVar(name, default=())

    @contextmanager
    def let(self, owner: object, value: T) -> Iterator[None]:
        """State `value` for `owner`; what was stated before counts again afterwards."""
        block = _Block(owner, value)
        around = (each for each in self._blocks.get() if each() is not None)
        token = self._blocks.set((*around, weakref.ref(block)))
        try:
            yield
        finally:
            with suppress(ValueError):  # ended in another thread, as by the collector: it states nothing there
                self._blocks.reset(token)

    def of(self, owner: object, default: T) -> T:
        """What this thread states for `owner`."""
        for each in reversed(self._blocks.get()):
            block = each()
            if block is not None and block.owner is owner:
                return block.value
        return default


class _Block(Generic[T]):
    """A block that states something; its frame alone holds it."""

    def __init__(self, owner: object, value: T) -> None:
        self.owner, self.value = owner, value
