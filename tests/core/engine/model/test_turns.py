"""A turn lasts until it is ended or the frame it was taken for has ended, in whatever thread and however."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import FrameType

import pytest
from interrupts import Worker, in_child

from dropflow.engine.model.turns import Turn, Turns, calling_frame


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A thread."""
    thread = Worker()
    yield thread
    thread.end()


class Call:
    """A call that takes a turn and stays in its frame until it is let go."""

    def __init__(self) -> None:
        self.turns, self.inside, self.go = Turns(), threading.Event(), threading.Event()
        self.turn: Turn | None = None

    def __call__(self) -> str:
        here = "its own"
        self.turn = self.turns.take(sys._getframe())
        self.inside.set()
        self.go.wait(20)
        if here == "raise":
            raise KeyboardInterrupt
        return here


def test_another_threads_turn_lasts_as_long_as_its_frame(worker: Worker) -> None:
    call = Call()
    begun = worker.start(call)
    assert call.inside.wait(20)
    assert call.turn is not None
    assert not call.turn.over
    assert not call.turn.over  # looking at it does not end it, nor change the frame's variables
    call.go.set()
    assert begun.result(20) == "its own"
    assert call.turn.over


def test_a_frame_that_is_being_left_is_looked_at_safely(worker: Worker) -> None:
    """While a frame's variables are freed it is still on the stack of its thread, and seen there it is half freed."""
    call, leaving, gone = Call(), threading.Event(), threading.Event()

    class Last:
        def __del__(self) -> None:
            leaving.set()
            gone.wait(20)

    def left() -> None:
        last = Last()  # noqa: F841

    def run() -> None:
        call.turn = call.turns.take(sys._getframe())
        left()

    begun = worker.start(run)
    assert leaving.wait(20)
    assert call.turn is not None
    assert not call.turn.over
    gone.set()
    begun.result(20)
    assert call.turn.over


def test_a_forked_child_waits_for_no_thread_that_it_does_not_have(worker: Worker) -> None:
    call = Call()
    begun = worker.start(call)
    assert call.inside.wait(20)
    turn = call.turn
    assert turn is not None
    assert in_child(lambda: turn.over) == 0
    assert not turn.over
    call.go.set()
    begun.result(20)


def test_a_generator_takes_the_turn_of_who_runs_it() -> None:
    def generator() -> Iterator[FrameType]:
        yield calling_frame()

    def runs() -> tuple[FrameType, FrameType]:
        return next(generator()), sys._getframe()

    taken, own = runs()
    assert taken is own
