"""Spans of the engine's work that an instrument can time; they cost nothing when no instrument is watching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

Watch = Callable[[str], AbstractContextManager[object]]
TAP = "tap"
"""Span in which the q and k of a running layer are made available to a stage."""

_watch: ContextVar[Watch | None] = ContextVar("dropflow_watch", default=None)
_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[object]:
    """A context manager around one span: the one that `watch` makes, or one that does nothing."""
    watch = _watch.get()
    return _NOTHING if watch is None else watch(name)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Let `watch` make the context managers of this thread's spans inside the block."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)
