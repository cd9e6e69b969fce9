"""The circumstances that benchmarks state beside their numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dropflow_lab.bench.random_llava import SubjectShape
from dropflow_lab.measure.machine import Machine, check_device


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a benchmark has measured on a model of random weights; each benchmark adds its numbers."""

    clock: str
    """Whether times are the CPU time of this process, which other programs affect least, or `wall` time."""
    subject: SubjectShape
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def clock_of(device: str) -> tuple[str, Callable[[], float]]:
    """Return what the clock for a device is called, and the clock: CPU time of this process, or wall time on a GPU.

    Raises `InputError` as `check_device` does.
    """
    check_device(device)
    return ("cpu", time.process_time) if torch.device(device).type == "cpu" else ("wall", time.perf_counter)
