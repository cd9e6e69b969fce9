"""Work that a thread of its own does beside a call, on a CUDA device on a stream of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class SideWork(Generic[T]):
    """One piece of work in a thread that ends with it; it sees the modes of torch of the thread that made it.

    The work is claimed once: by its thread when it starts, or by `end`, after which it never starts. So no interrupt of
    the thread that begins it leaves work that nobody waits for.
    """

    def __init__(self, make: Callable[[], T], holds: Any, device: torch.device, inputs: object = ()) -> None:
        """`inputs` hold the tensors on `device` that the work reads and that the caller may free."""
        self.holds = holds
        """Data that the owner keeps for the duration of the work."""
        self._make: Callable[[], T] | None = make
        self._claim: dict[str, str] = {}
        self._modes = _modes(device.type)
        self._stream = _SideStream(device, inputs) if device.type == "cuda" else None
        self._ended, self._process = threading.Event(), os.getpid()
        self._made: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="dropflow-side-work")

    @property
    def mine(self) -> bool:
        """Whether this thread is the one that works."""
        here = threading.get_ident() == self._thread.ident  # a number that another thread may have later
        return here and not self._ended.is_set() and self._process == os.getpid()

    def begin(self) -> None:
        """Start the thread."""
        self._thread.start()

    def result(self) -> T:
        """Wait for the result, once; raises what the work raised."""
        self.end(claim=False)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        made = self._made.pop()
        if self._stream is not None:
            self._stream.hand_over(made)
        return made

    def end(self, *, claim: bool = True) -> None:
        """Wait until the work has ended; with `claim`, work that has not started never does."""
        if self._process != os.getpid() or (claim and self._claimed_by("end")):
            return  # a fork leaves only the thread that forks
        self._ended.wait()
        self._thread.join()
        if self._stream is not None:
            self._stream.join()

    def _claimed_by(self, who: str) -> bool:
        """Claim the work unless it has been; whether it is now `who`'s. Atomic, and the same whenever it is asked."""
        return self._claim.setdefault("by", who) == who

    def _run(self) -> None:
        make, self._make = self._make, None
        if make is None or not self._claimed_by("thread"):
            return
        try:
            with ExitStack() as inside:
                if self._stream is not None:
                    inside.enter_context(self._stream.inside())
                inside.enter_context(self._modes())
                self._made.append(make())
        except BaseException as error:  # noqa: BLE001  # raised where the result is asked for
            self._error = error
        finally:
            self._ended.set()


class _SideStream:
    """A CUDA stream beside that of the thread which makes it, which has done before what is queued there now."""

    def __init__(self, device: torch.device, inputs: object) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._stream.wait_stream(torch.cuda.current_stream(device))
        for tensor in tensors_in(inputs):
            tensor.record_stream(self._stream)  # freed by the caller, its memory must outlive what reads it here
        self._done: torch.cuda.Event | None = None

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Queue this thread's work on the stream."""
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self._done = self._stream.record_event()

    def join(self) -> None:
        """Let the current stream of this thread wait for the work, not the host."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)

    def hand_over(self, made: object) -> None:
        """Let what was made here be read, and freed, on the current stream of this thread."""
        for tensor in tensors_in(made):
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            yield from tensors_in(getattr(value, one.name))


def _modes(device: str) -> Callable[[], Any]:
    """Makes a context in which another thread has this thread's modes: gradients, inference mode and autocast."""
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in {"cpu", device} if torch.is_autocast_enabled(kind)]
    cached = torch.is_autocast_cache_enabled()

    @contextmanager
    def same() -> Iterator[None]:
        with ExitStack() as inside:
            inside.enter_context(torch.inference_mode(inference))
            inside.enter_context(torch.set_grad_enabled(gradients))
            for kind, dtype in casts:
                inside.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=cached))
            yield

    return same
