"""Threads take turns on one model, and no turn outlives the call it was taken for, however that call ended.

A turn ends when its owner says so, or when the frame it was taken for has left its thread's stack. So an exception
that no hook sees (a keyboard interrupt, a `SystemExit` in a thread of a pool), a thread that is gone, and a fork in the
middle of somebody's forward all end a turn, without anybody's help.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

PATIENCE = 0.02
"""Seconds between two looks at a turn that has not been ended, such as one whose thread died."""


class Turn:
    """The right of one thread to run a model, for as long as one frame runs."""

    __slots__ = ("_ended", "_frame", "_gate", "_next", "_thread", "call")

    def __init__(self, frame: FrameType | None) -> None:
        self._thread = threading.get_ident()
        self._frame = frame
        self._ended = frame is None
        self._gate = threading.Lock()  # held until the turn ends, so that others can wait for it
        self._gate.acquire(blocking=False)
        self._next: dict[str, Turn] = {}
        self.call: Any = None
        """What the owner of the turn keeps for its time."""

    @property
    def mine(self) -> bool:
        """Whether this thread took it, and it is not over."""
        return self._thread == threading.get_ident() and not self.over

    @property
    def over(self) -> bool:
        """Whether it was ended, or the frame it was taken for is gone."""
        return self._ended or not _runs(self._thread, self._frame)

    def end(self) -> None:
        """Let the next one have its turn; harmless when ended."""
        self._ended = True
        self._frame = self.call = None
        if self._gate.locked():
            self._gate.release()

    def wait(self) -> None:
        """Return soon after it is over."""
        while not self.over:
            if self._gate.acquire(timeout=PATIENCE):
                self._gate.release()

    def followed_by(self, other: Turn) -> Turn:
        """The turn that comes next: `other`, unless some thread was faster. One wins, whoever asks (atomic)."""
        return self._next.setdefault("next", other)

    def last(self) -> Turn:
        """The last of the turns that follow."""
        turn = self
        while turn._next:
            turn = turn._next["next"]
        return turn


class Turns:
    """The turns on one model, each taken when the one before is over.

    There is no lock that an interrupt at a wrong line could leave locked: a turn is taken by becoming the follower of
    the last one, which is one atomic step.
    """

    def __init__(self) -> None:
        self._last = Turn(None)

    def take(self, frame: FrameType) -> Turn:
        """Wait until no other turn runs, and have one that lasts until it is ended or `frame` has returned.

        The caller must not have one already.
        """
        own = Turn(frame)
        while True:
            last = self._last.last()
            last.wait()
            winner = last.followed_by(own)
            self._last = winner
            if winner is own:
                return own

    def mine(self) -> Turn | None:
        """The turn that this thread has now."""
        last = self._last.last()
        return last if last.mine else None


def calling_frame() -> FrameType:
    """The innermost frame that is neither this package's nor Dynamo's: the call in which a hook of ours runs."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_between(frame):
        frame = frame.f_back
    return frame


def _is_between(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name.startswith(("dropflow.engine", "torch._dynamo"))


def _runs(thread: int, frame: FrameType | None) -> bool:
    if frame is None:
        return False
    top = sys._getframe() if thread == threading.get_ident() else sys._current_frames().get(thread)
    while top is not None and top is not frame:
        top = top.f_back
    return top is not None
