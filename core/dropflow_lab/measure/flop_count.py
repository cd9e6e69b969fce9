"""Counts the floating-point operations of a call as it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


@dataclass(frozen=True)
class Flops:
    """FLOPs of a call; a multiply-add is two."""

    full: int
    """Attention counted as the full rectangle of queries and keys, as is usual."""
    causal: int
    """The same without what lies above the diagonal where a fused kernel runs causal attention without a mask.

    That is the least such a kernel computes. Kernels skip it in blocks, so what they compute lies between both numbers.
    Attention with a mask is computed, and counted, as the full rectangle.
    """


def flops_of(run: Callable[[], object]) -> Flops:
    """Count the FLOPs of one call. Counting slows a call down: never time one while counting."""
    skipped: list[int] = []
    with FlopCounterMode(display=False, custom_mapping=_attention_formulas(skipped)) as counter:
        run()
    full = int(counter.get_total_flops())
    return Flops(full, full - sum(skipped))


def count_flops(run: Callable[[], object]) -> int:
    """Return the FLOPs of one call (a multiply-add is two); attention counts the full rectangle, not the causal half.

    Counting slows a call down: never time one while counting.
    """
    return flops_of(run).full


def _attention_formulas(skipped: list[int]) -> dict[Any, Callable[..., int]]:
    """Formulas of the fused attention kernels, which add to `skipped` what a causal one may leave out of their FLOPs.

    Torch 2.13 has formulas for the kernels of GPUs, without causality, but none for those that SDPA runs on a CPU.
    """

    def formula(kernel: Any, count: Callable[..., Any]) -> Callable[..., int]:
        names = [argument.name for argument in kernel.default._schema.arguments]
        query, is_causal = names.index("query"), names.index("is_causal")

        def flops(*args: Any, **_: Any) -> int:  # shapes take the place of tensors; defaults at the end are left out
            found, queries, keys = int(count(*args[: query + 3])), args[query][-2], args[query + 1][-2]
            if queries == keys and args[is_causal : is_causal + 1] == (True,):
                skipped.append(found - found * (queries + 1) // (2 * queries))
            return found

        return flops

    found = {}
    for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
        for suffix, count in (("", sdpa_flop_count), ("_backward", sdpa_backward_flop_count)):
            kernel = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}{suffix}")
            found[kernel] = formula(kernel, count)
    return found
