"""Counts the floating-point operations of a call as it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def count_flops(run: Callable[[], object]) -> int:
    """Return the FLOPs of one call (a multiply-add is two); attention counts the full rectangle, not the causal half.

    Counting slows a call down: never time one while counting.
    """
    with FlopCounterMode(display=False, custom_mapping={_CPU_SDPA: _cpu_sdpa_flops}) as counter:
        run()
    return int(counter.get_total_flops())


def _cpu_sdpa_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs of one attention call, from the shapes of its inputs."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]  # torch leaves it untyped


# torch counts the fused attention kernels of GPUs, but not the one that SDPA runs on a CPU (torch 2.13)
_CPU_SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
