"""Counts how often a call makes the host wait for the GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

_SAYS = "synchronizing CUDA operation"
"""What torch warns of in its debug mode."""


def count_host_syncs(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the number of operations of one call for which the host waits; `None` where the device is no GPU.

    As torch's debug mode for synchronisations counts them.
    """
    if device.type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum(_SAYS in str(one.message) for one in told)
