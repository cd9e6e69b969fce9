"""Work beside a call: how often it runs, how it ends, and how it uses streams on a CUDA device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dropflow.engine.model.side_work import SideWork, tensors_in

CPU = torch.device("cpu")


def test_the_result_is_made_once_in_a_thread_that_ends() -> None:
    names: list[str] = []

    def make() -> int:
        names.append(threading.current_thread().name)
        return 7

    work = SideWork(make, None, CPU)
    work.begin()
    assert work.result() == 7
    work.end()
    assert names == ["dropflow-side-work"]
    assert "dropflow-side-work" not in [thread.name for thread in threading.enumerate()]


def test_work_that_was_ended_before_it_began_never_runs() -> None:
    ran: list[int] = []
    work = SideWork(lambda: ran.append(1), None, CPU)
    work.end()
    work.begin()  # as where an interrupt struck in between
    work.end()
    for thread in threading.enumerate():
        if thread.name == "dropflow-side-work":
            thread.join(5)
    assert ran == []


def test_ending_waits_for_work_that_runs() -> None:
    go, ran = threading.Event(), list[int]()
    begun = threading.Event()

    def make() -> None:
        begun.set()
        go.wait(20)
        ran.append(1)

    work = SideWork(make, None, CPU)
    work.begin()
    begun.wait(20)
    threading.Timer(0.05, go.set).start()
    work.end()
    assert ran == [1]


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt("stop"), SystemExit(3)])
def test_errors_are_raised_where_the_result_is_asked_for(error: BaseException) -> None:
    def make() -> None:
        raise error

    work = SideWork(make, None, CPU)
    work.begin()
    with pytest.raises(type(error)) as raised:
        work.result()
    assert raised.value is error


def test_only_its_own_thread_is_the_one_that_works() -> None:
    found: list[bool] = []
    work: SideWork[None] = SideWork(lambda: found.append(work.mine), None, CPU)
    assert not work.mine
    work.begin()
    work.result()
    assert found == [True]
    assert not work.mine


@pytest.mark.parametrize("gradients", [False, True])
def test_the_thread_has_the_modes_and_the_number_of_threads_of_its_maker(gradients: bool) -> None:
    def seen() -> tuple[Any, ...]:
        cast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cast, torch.get_num_threads()

    with torch.set_grad_enabled(gradients), torch.autocast("cpu", dtype=torch.float16):
        expected = seen()
        work = SideWork(seen, None, CPU)
        work.begin()
        assert work.result() == expected
    assert expected[0] == gradients
    with torch.inference_mode():
        inferring = SideWork(seen, None, CPU)
        inferring.begin()
        assert inferring.result()[1]


@dataclass
class Fields:
    """Holds a tensor among other things."""

    tensor: torch.Tensor
    name: str = "x"


def test_tensors_are_found_wherever_they_are() -> None:
    own = [torch.zeros(1) for _ in range(4)]
    assert [id(one) for one in tensors_in([own[0], (own[1],), {"a": own[2], "b": 3}, Fields(own[3]), None])] == [
        id(one) for one in own
    ]


class Streams:
    """Stands for the streams of `torch.cuda`: records what is done to them, and in which thread."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.local = threading.local()

    def now(self) -> str:
        found: str = getattr(self.local, "stream", "main")
        return found

    def stream(self, name: str) -> Any:
        told = self.told

        class Stream:
            def __str__(self) -> str:
                return name

            def wait_stream(self, other: Any) -> None:
                told.append(f"{name} waits for stream {other}")

            def wait_event(self, event: str) -> None:
                told.append(f"{name} waits for {event}")

            def record_event(self) -> str:
                told.append(f"{name} records")
                return f"event of {name}"

        return Stream()

    @contextmanager
    def inside(self, stream: Any) -> Iterator[None]:
        self.local.stream = str(stream)
        yield
        self.local.stream = "main"


class OnDevice(torch.Tensor):
    """A tensor that says it is on a CUDA device, and on which streams it is used."""

    used: list[str]
    is_cuda = True

    def record_stream(self, stream: Any) -> None:
        self.used.append(str(stream))


def on_device() -> OnDevice:
    tensor = torch.zeros(1).as_subclass(OnDevice)
    tensor.used = []
    return tensor


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    fake = Streams()
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: fake.stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: fake.stream(fake.now()))
    monkeypatch.setattr(torch.cuda, "stream", fake.inside)
    return fake


def test_on_a_cuda_device_it_queues_on_a_stream_of_its_own(streams: Streams) -> None:
    read, made = on_device(), on_device()

    def make() -> list[OnDevice]:
        streams.told.append(f"work on {streams.now()}")
        return [made]

    work = SideWork(make, None, torch.device("cuda", 0), {"pixel_values": read})
    work.begin()
    (found,) = work.result()
    assert found is made
    assert streams.told == [
        "side waits for stream main",
        "work on side",
        "side records",
        "main waits for event of side",
    ]
    assert (read.used, made.used) == (["side"], ["main"])


def test_a_call_that_is_given_up_lets_its_stream_wait_too(streams: Streams) -> None:
    work = SideWork(lambda: 1 / 0, None, torch.device("cuda", 0))
    work.begin()
    with pytest.raises(ZeroDivisionError):
        work.result()
    assert streams.told[-1] == "main waits for event of side"
