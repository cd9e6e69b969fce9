"""Precision of a training step on this processor."""

from __future__ import annotations

import torch

_WITHOUT_BF16 = ("DEFAULT", "AVX2")


def autocast() -> torch.autocast:
    """Return the context of a step: bf16, or float32 on a processor whose vector units do not support bf16.

    There torch emulates bf16: a language step took 50 s instead of 14 s on one core of an EPYC with AVX2.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.backends.cpu.get_cpu_capability() not in _WITHOUT_BF16)
