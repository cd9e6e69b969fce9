"""Interrupts and forks at chosen lines of the engine, and threads that live on after them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any, Generic, NoReturn, TypeVar, cast

import dropflow.engine
from dropflow.policy import recorded

T = TypeVar("T")
ENGINE = str(Path(dropflow.engine.__file__).parent)
RECORDED = recorded.__file__
ERRORS = (KeyboardInterrupt, SystemExit)
"""What ends a thread's work without being an error of that work."""


@dataclass(frozen=True)
class Line:
    """The n-th time, from 1, that a line of the engine is passed."""

    file: str
    number: int
    time: int = 1

    def __str__(self) -> str:
        return f"{self.file.rpartition('dropflow/')[2]}:{self.number}" + (f" ({self.time})" if self.time > 1 else "")


def lines_passed(run: Callable[[], Any]) -> list[Line]:
    """Every line of the engine that `run` passes in this thread, as often as it does, in order.

    What writes the policy into a model's config counts as a part of it.
    """
    times: Counter[tuple[str, int]] = Counter()
    found: list[Line] = []

    def note(file: str, number: int) -> None:
        times[file, number] += 1
        found.append(Line(file, number, times[file, number]))

    _traced(run, (ENGINE, RECORDED), note)
    return found


def act_at(line: Line, act: Callable[[], Any], run: Callable[[], Any]) -> bool:
    """Run `run`, and call `act` where this thread passes `line`; whether it does."""
    left = line.time

    def passed(file: str, number: int) -> None:  # noqa: ARG001
        nonlocal left
        if number == line.number:
            left -= 1
            if not left:
                act()

    _traced(run, line.file, passed)
    return left <= 0


def interrupt_at(line: Line, error: type[BaseException], run: Callable[[], Any]) -> bool:
    """Run `run`, and raise `error` where this thread passes `line`; whether it does."""
    interrupt = error("interrupted")

    def strike() -> None:
        raise interrupt

    try:
        return act_at(line, strike, run)
    except error as raised:
        if raised is not interrupt:
            raise
        raised.__traceback__ = None  # nothing of the call is held any more
        return True


def _traced(run: Callable[[], Any], files: str | tuple[str, ...], told: Callable[[str, int], None]) -> None:
    """Call `run`, and `told` with every line it passes in files whose names begin so."""

    def inside(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            told(frame.f_code.co_filename, frame.f_lineno)
        return inside

    def entered(frame: FrameType, event: str, _: Any) -> Any:  # noqa: ARG001
        return inside if frame.f_code.co_filename.startswith(files) else None

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        run()
    finally:
        sys.settrace(before)


class Task(Generic[T]):
    """What a worker does, and its end."""

    def __init__(self, work: Callable[[], T], stack: Callable[[], str]) -> None:
        self._work: Callable[[], T] | None = work
        self._stack = stack
        self._value: T | None = None
        self._error: BaseException | None = None
        self._ended = threading.Event()

    def __call__(self) -> None:
        work, self._work = self._work, None
        assert work is not None
        try:
            self._value = work()
        except BaseException as error:  # noqa: BLE001  # raised where the result is asked for
            self._error = error.with_traceback(None)
        self._ended.set()

    def wait(self, timeout: float) -> bool:
        """Whether it ends in this time."""
        return self._ended.wait(timeout)

    def result(self, timeout: float) -> T:
        """What it gives; raises what it raises, and `AssertionError` where it hangs."""
        if not self.wait(timeout):
            raise AssertionError(f"hangs for {timeout} s: {self._stack()}")
        if self._error is not None:
            raise self._error
        return cast("T", self._value)


class Worker:
    """A thread like one of a pool: it does what it is given, whatever ends that, and lives on."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Task[Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)  # one that hangs must not hold up the process
        self._thread.start()

    def start(self, task: Callable[[], T]) -> Task[T]:
        """Begin `task`."""
        begun = Task(task, self.stack)
        self._tasks.put(begun)
        return begun

    def run(self, task: Callable[[], T], timeout: float = 30) -> T:
        """The result of `task`."""
        return self.start(task).result(timeout)

    def interrupt(self, error: type[BaseException] = KeyboardInterrupt) -> None:
        """Raise `error` in the thread, at whatever instruction it is."""
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident or 0), ctypes.py_object(error))

    def stack(self) -> str:
        """Where the thread is."""
        frame, found = sys._current_frames().get(self._thread.ident or 0), []
        while frame is not None:
            found.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
            frame = frame.f_back
        return " < ".join(found)

    def end(self) -> None:
        """Let the thread go."""
        self._tasks.put(None)
        self._thread.join(5)

    def _work(self) -> None:
        task: Task[Any] | None = None
        while True:
            try:
                task = self._tasks.get()
                if task is None:
                    return
                task()
                task = None
            except KeyboardInterrupt:  # one that came too late
                continue


def in_child(check: Callable[[], bool]) -> int:
    """Fork, and let the child say by its exit code whether `check` holds there: 0 if so, -9 where it hangs."""
    pid = os.fork()
    if not pid:
        leave(check)
    return exit_code(pid)


def leave(check: Callable[[], bool]) -> NoReturn:
    """End this process, which is a child of the tests'."""
    code = 1
    try:
        code = 0 if check() else 2
    finally:
        os._exit(code)


def exit_code(pid: int, timeout: float = 30) -> int:
    """How a child ended; one that hangs is killed."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
