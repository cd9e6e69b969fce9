"""Peak memory of a call, in bytes allocated beyond those alive before it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the largest number of bytes of tensors alive at once during one call, less those alive before it.

    On a GPU this is the caching allocator's own maximum; on a CPU the running sum of every allocation and release that
    torch's profiler sees. Profiling slows a call down: never time one while profiling.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    gc.collect()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it announces on stderr that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    results = watched.profiler.kineto_results if watched.profiler is not None else None
    events = [] if results is None else results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda one: one[0]):
        held += change
        peak = max(peak, held)
    return peak
