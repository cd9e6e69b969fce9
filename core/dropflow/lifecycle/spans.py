"""Stretches of the engine's work that an instrument may time where they run; nobody else pays for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

Watch = Callable[[str], AbstractContextManager[object]]
TAP = "tap"
"""What it takes to show a stage q and k of a layer that runs."""

_watch: ContextVar[Watch | None] = ContextVar("dropflow_watch", default=None)
_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[object]:
    """A context manager around one stretch: the watch's own, or one that does nothing."""
    watch = _watch.get()
    return _NOTHING if watch is None else watch(name)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Let `watch` make the context managers of this thread's stretches inside the block."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)
