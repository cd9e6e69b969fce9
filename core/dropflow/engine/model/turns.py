"""Lets threads take turns on one model; no turn outlives the call it was taken for, however that call ended.

A turn ends when its owner ends it, or when the frame it was taken for has left its thread's stack. So an exception
that no hook sees (a keyboard interrupt, a `SystemExit` in a pool thread), a thread that has died, and a fork in the
middle of another thread's forward all end a turn automatically.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

from torch import nn

from dropflow.errors import UnsupportedCall

PATIENCE = 0.02
"""Seconds between two checks of a turn that has not been ended, such as one whose thread died."""
REMEMBERED = 8
"""Number of recent stack depths at which a turn's frame is looked for first: hooks are called from few places."""
_CALL = nn.Module._call_impl.__code__
_SUSPENDED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Turn:
    """One thread's right to run a model for as long as a given frame runs."""

    __slots__ = ("_depths", "_ended", "_frame", "_gate", "_next", "_process", "_thread", "call")

    def __init__(self, frame: FrameType | None, depths: list[int]) -> None:
        self._process, self._thread = os.getpid(), threading.get_ident()
        self._frame = frame
        self._depths = depths
        self._ended = frame is None
        self._gate = threading.Lock()  # held until the turn ends, so that others can wait for it
        self._gate.acquire(blocking=False)
        self._next: dict[str, Turn] = {}
        self.call: Any = None
        """Data that the turn's owner keeps for the duration of the turn."""

    @property
    def mine(self) -> bool:
        """Whether this thread holds the turn and it is not over."""
        return self._thread == threading.get_ident() and not self.over

    @property
    def over(self) -> bool:
        """Whether the turn was ended, or the frame it was taken for is gone."""
        if not self._ended and not self._runs():
            self._frame = self.call = None  # a turn left by an interrupt must not keep a model alive
            self._ended = True  # last, so that an interrupt in between leaves no turn that is over but holds a call
        return self._ended

    def end(self) -> None:
        """End the turn, so that the next one can begin; does nothing if already ended."""
        self._frame = self.call = None
        self._ended = True
        if self._gate.locked():
            self._gate.release()

    def wait(self) -> None:
        """Block until shortly after the turn is over."""
        while not self.over:
            if self._gate.acquire(timeout=PATIENCE):
                self._gate.release()

    def followed_by(self, other: Turn) -> Turn:
        """The turn that comes next: `other`, unless another thread was faster. Atomic, so all callers see the same."""
        return self._next.setdefault("next", other)

    def last(self) -> Turn:
        """The last turn in the chain that begins here."""
        turn = self
        while turn._next:
            turn = turn._next["next"]
        return turn

    def _runs(self) -> bool:
        """Whether the frame is on the stack of its thread, which may keep running during the check."""
        frame = self._frame  # another thread may clear it at any time by ending the turn
        if frame is None:
            return False
        if self._thread == threading.get_ident():
            return _runs_here(frame, self._depths)
        return self._process == os.getpid() and _runs_there(frame)  # a fork leaves only the thread that forks


class Turns:
    """The turns on one model, each of which begins when the one before is over.

    There is no lock that an interrupt at the wrong line could leave locked: a turn is taken by becoming the successor
    of the last one, in one atomic step.
    """

    def __init__(self) -> None:
        self._depths: list[int] = []
        self._last = Turn(None, self._depths)

    def take(self, frame: FrameType) -> Turn:
        """Wait until no other turn is active, then return one that lasts until it is ended or `frame` returns.

        The caller must not already hold one.
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
        """The turn that this thread currently holds."""
        last = self._last.last()
        return last if last.mine else None


def calling_frame() -> FrameType:
    """The innermost frame outside this package and Dynamo, and not of a generator: the call in which our hook runs."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (_is_between(frame) or frame.f_code.co_flags & _SUSPENDED):
        frame = frame.f_back
    return frame


def refuse_own_model(name: str) -> NoReturn:
    """Refuse a call of a model, or of a part of it, during its own forward."""
    raise UnsupportedCall(
        f"{name}: called inside its own forward, for example by a stage's hook; a stage may run other models, "
        "including attached ones, but not the one it is attached to"
    )


def inside_of(module: nn.Module) -> bool:
    """Whether this thread is inside a call of the module, by looking for it on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def names_inside(module: nn.Module) -> set[str]:
    """Names that the code of this thread's frames uses, up to the innermost call of the module."""
    names: set[str] = set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not (frame.f_code is _CALL and frame.f_locals.get("self") is module):
        if not _is_between(frame):
            names.update(frame.f_code.co_names)
        frame = frame.f_back
    return names


def inside_generate() -> bool:
    """Whether this thread is inside a `generate` of transformers."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not str(frame.f_globals.get("__name__", "")).startswith("transformers.generation."):
        frame = frame.f_back
    return frame is not None


def _is_between(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name.startswith(("dropflow.engine", "torch._dynamo"))


def _runs_here(frame: FrameType, depths: list[int]) -> bool:
    """Whether a frame is on this thread's stack; `depths` holds the depths at which frames were found before."""
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
    """The frame `depth` calls below the caller's; far faster than a walk, which creates an object for every frame."""
    try:
        return sys._getframe(depth + 1)
    except ValueError:  # the stack is not that deep
        return None


def _runs_there(frame: FrameType) -> bool:
    """Whether a frame, not of a generator, is on the stack of another thread.

    A frame that has ended loses its variables. It is not looked for on that stack: in Python 3.11 a frame that a thread
    is just leaving can be seen there when it is already half freed, and the process crashes.
    """
    try:
        frame.clear()
    except RuntimeError:  # it is executing
        return True
    return False
