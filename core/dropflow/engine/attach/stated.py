"""What callers state for the calls of their thread: which tokens are visual, and which policy of a set counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")


class Stated(Generic[T]):
    """A value for each of several owners, for this thread, inside a block; blocks may be nested."""

    def __init__(self, name: str) -> None:
        self._values: ContextVar[Mapping[object, T]] = ContextVar(name, default={})  # noqa: B039  # never changed

    @contextmanager
    def let(self, owner: object, value: T) -> Iterator[None]:
        """State `value` for `owner`; what was stated before counts again afterwards."""
        token = self._values.set({**self._values.get(), owner: value})
        try:
            yield
        finally:
            self._values.reset(token)

    def of(self, owner: object, default: T) -> T:
        """What this thread states for `owner`."""
        return self._values.get().get(owner, default)
