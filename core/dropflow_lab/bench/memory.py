"""How much memory a call needs at its peak, counted by torch's allocator, so that other processes do not matter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Return the bytes that `run` holds at its peak, beyond those allocated before.

    On a CPU the allocations and releases that torch reports to its profiler are added up in their order; on a GPU the
    allocator counts itself. Memory of other libraries is not seen. Never time a call under this.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    results = profiled.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda one: one[0]):
        held += change
        peak = max(peak, held)
    return peak
