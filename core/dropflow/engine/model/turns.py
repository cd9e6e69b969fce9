"""Threads take turns on one model, and no turn outlives the call it was taken for, however that call ended.

A turn ends when its owner says so, or when the frame it was taken for has left its thread's stack. So an exception
that no hook sees (a keyboard interrupt, a `SystemExit` in a thread of a pool), a thread that is gone, and a fork in the
middle of somebody's forward all end a turn, without anybody's help.
"""

from __future__ import annotations

import inspect
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

from torch import nn

from dropflow.errors import UnsupportedCall

PATIENCE = 0.02
"""Seconds between two looks at a turn that has not been ended, such as one whose thread died."""
REMEMBERED = 8
"""Depths of stacks at which the frame of a turn is looked for first: hooks are called from few places."""
_CALL = nn.Module._call_impl.__code__
_SUSPENDED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Turn:
    """The right of one thread to run a model, for as long as one frame runs."""

    __slots__ = ("_depths", "_ended", "_frame", "_gate", "_next", "_thread", "call")

    def __init__(self, frame: FrameType | None, depths: list[int]) -> None:
        self._thread = threading.get_ident()
        self._frame = frame
        self._depths = depths
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
        if not self._ended and not self._runs():
            self._ended = True
            self._frame = self.call = None  # what an interrupt has left must not keep a model alive
        return self._ended

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

    def _runs(self) -> bool:
        """Whether the frame is on the stack of its thread, which may go on running meanwhile."""
        frame = self._frame  # which another thread may take away meanwhile, by ending the turn
        if frame is None:
            return False
        if self._thread == threading.get_ident():
            return _runs_here(frame, self._depths)
        return _runs_there(frame, self._thread)


class Turns:
    """The turns on one model, each taken when the one before is over.

    There is no lock that an interrupt at a wrong line could leave locked: a turn is taken by becoming the follower of
    the last one, which is one atomic step.
    """

    def __init__(self) -> None:
        self._depths: list[int] = []
        self._last = Turn(None, self._depths)

    def take(self, frame: FrameType) -> Turn:
        """Wait until no other turn runs, and have one that lasts until it is ended or `frame` has returned.

        The caller must not have one already.
        """
        own = Turn(frame, self._depths)
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


def refuse_own_model(name: str) -> NoReturn:
    """Refuse a call of a model, or of a part of it, in the middle of its own forward."""
    raise UnsupportedCall(
        f"{name}: called inside of its own forward, such as by a stage's hook; a stage may run other models, attached "
        "ones too, but not the one it is attached to"
    )


def inside_of(module: nn.Module) -> bool:
    """Whether this thread is in a call of a module, which then is further down its stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def inside_generate() -> bool:
    """Whether this thread is in a `generate` of transformers."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not str(frame.f_globals.get("__name__", "")).startswith("transformers.generation."):
        frame = frame.f_back
    return frame is not None


def _is_between(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name.startswith(("dropflow.engine", "torch._dynamo"))


def _runs_here(frame: FrameType, depths: list[int]) -> bool:
    """Whether a frame is on the stack of this thread. `depths` remembers where frames were found, counted from here."""
    for depth in depths:
        if _at(depth) is frame:
            return True
    found = 0
    top: FrameType | None = sys._getframe()
    while top is not frame:
        if top is None:
            return False
        found, top = found + 1, top.f_back
    depths.append(found)
    del depths[:-REMEMBERED]
    return True


def _at(depth: int) -> FrameType | None:
    """The frame so many calls down from the caller's. Far faster than a walk, which makes an object of every frame."""
    try:
        return sys._getframe(depth + 1)
    except ValueError:  # the stack is not so deep
        return None


def _runs_there(frame: FrameType, thread: int) -> bool:
    """Whether a frame is on the stack of another thread."""
    while True:
        top = last = sys._current_frames().get(thread)
        while top is not None and top is not frame:
            last, top = top, top.f_back
        if top is not None:
            return True
        if last is None or not last.f_code.co_flags & _SUSPENDED:
            return False
        # no stack ends at a generator: it has yielded while we were looking, and so has lost the frames below it
