"""What callers state for their thread's calls: which tokens are visual, and which policy of a set to use."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")


class Stated(Generic[T]):
    """A value per owner that applies to one thread inside a block; blocks may be nested.

    The value applies only as long as its block object exists, so a block whose exit was interrupted no longer applies.
    """

    def __init__(self, name: str) -> None:
        self._blocks: ContextVar[tuple[weakref.ref[_Block[T]], ...]] = ContextVar(name, default=())

    @contextmanager
    def let(self, owner: object, value: T) -> Iterator[None]:
        """State `value` for `owner`; the value stated before applies again afterwards."""
        block = _Block(owner, value)
        around = (each for each in self._blocks.get() if each() is not None)
        token = self._blocks.set((*around, weakref.ref(block)))
        try:
            yield
        finally:
            with suppress(ValueError):  # ended in another thread, for example by the garbage collector
                self._blocks.reset(token)

    def of(self, owner: object, default: T) -> T:
        """The value that this thread states for `owner`."""
        for each in reversed(self._blocks.get()):
            block = each()
            if block is not None and block.owner is owner:
                return block.value
        return default


class _Block(Generic[T]):
    """A block that states a value; only the block's frame holds a reference to it."""

    def __init__(self, owner: object, value: T) -> None:
        self.owner, self.value = owner, value
