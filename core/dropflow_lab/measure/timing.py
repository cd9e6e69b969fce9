"""Times several callables in turn, in one process, so that a slow moment of the machine affects all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """Median of a set of samples, with its lower and upper quartile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Summarise two or more samples."""
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)

    def over(self, divisor: float) -> Spread:
        """Return the spread of every sample divided by one number."""
        return Spread(self.median / divisor, self.low / divisor, self.high / divisor)


def interleaved(
    runs: Mapping[Name, Callable[[], object]],
    rounds: int,
    repeats: Mapping[Name, int] | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, list[float]]:
    """Return seconds per call of each run, one sample per round; a sample is the mean of `repeats` calls (or of one).

    Every other round runs in reverse, so that no run always follows the same one. A warm-up round is discarded.
    Garbage is collected before each sample and never during one. `clock` reads seconds: `time.process_time`, for runs
    on one thread of a CPU, leaves out what other programs take of it.
    """
    samples: dict[Name, list[float]] = {name: [] for name in runs}
    order = list(runs)
    with no_garbage_collection():
        for index in range(rounds + 1):
            for name in order if index % 2 else order[::-1]:
                gc.collect()
                seconds = _seconds(runs[name], (repeats or {}).get(name, 1), clock)
                if index:
                    samples[name].append(seconds)
    return samples


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Return the spread of the ratios of samples taken in the same round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def _seconds(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    finish_queued()
    start = clock()
    for _ in range(repeats):
        run()
    finish_queued()
    return (clock() - start) / repeats


def finish_queued() -> None:
    """Wait for the work that is still queued on a GPU."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.cuda.synchronize()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep the garbage collector from running inside the block.

    What is alive before is frozen, so that it is not scanned before every sample. If the caller's program has frozen
    objects of its own, all of it stays frozen: to thaw some alone is not possible, and to collect all again takes long.
    """
    was_on, frozen = gc.isenabled(), gc.get_freeze_count() > 0
    gc.disable()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
        if was_on:
            gc.enable()
