"""The machine that a measurement was taken on."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from dropflow_lab.errors import InputError


@dataclass(frozen=True)
class Machine:
    """The processor and the versions that affect speed."""

    cpu: str
    threads: int
    """CPU threads that torch uses."""
    python: str
    torch: str
    transformers: str


def this_machine() -> Machine:
    """Describe the machine this process runs on."""
    versions = (platform.python_version(), torch.__version__, transformers.__version__)
    return Machine(_cpu(), torch.get_num_threads(), *versions)


def check_device(device: str) -> None:
    """Raise `InputError` for a device that torch does not know or does not see here."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError(f"--device: expected a device of torch, such as cpu or cuda, got {device!r}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch sees no CUDA device here; run this on a machine with a GPU")


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use `threads` CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
