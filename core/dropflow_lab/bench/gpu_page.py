"""The results of the GPU benchmark as text and as a page."""

from __future__ import annotations

from collections.abc import Sequence

from dropflow_lab.bench.gpu import GpuRow
from dropflow_lab.bench.reuse import ReuseRow
from dropflow_lab.markdown import table
from dropflow_lab.measure.timing import Spread

_MIB = 2**20


def told(row: GpuRow) -> str:
    """Return the results of one attention implementation in lines."""
    found, train = row.inference, row.train
    lines = [
        f"{row.attention}: prefill {_milliseconds(found.dense_prefill_seconds)} dense, "
        f"{_milliseconds(found.policy_prefill_seconds)} through the policy, speed-up {_spread(found.prefill_speedup)}; "
        f"training step speed-up {_spread(train.step_speedup)}, FLOPs ratio {train.flops_ratio:.3f}, peak memory ratio "
        f"{train.peak_memory_ratio:.3f}",
        f"prefill with overlap {_milliseconds(found.overlap_prefill_seconds)}, a further speed-up "
        f"{_spread(found.overlap_speedup)}; decode step {_milliseconds(found.dense_decode_seconds)} dense, "
        f"{_milliseconds(found.policy_decode_seconds)} through the policy; selection "
        f"{_milliseconds(found.selection_seconds)}; host synchronisations in a prefill {_syncs(row)}",
    ]
    lines += [f"compiled: {', '.join(_compiled(row))}"] if row.compiled is not None else []
    lines += [f"reuse under {one.policy}: {', '.join(_reused(one)[1:])}" for one in row.reuse]
    return "\n".join(lines)


def page(rows: Sequence[GpuRow], device: str, options: str) -> str:
    """Return the page; `options` are those of the command."""
    machine = rows[0].train.machine
    blocks = [
        "# Prefill, decoding, reuse and training on a GPU",
        f"`dropflow bench gpu {options}`, dense and HiDrop-64 in turn, random weights. Machine: {device}, "
        f"torch {machine.torch}, transformers {machine.transformers}. Medians with quartiles in brackets.",
        table(
            ("attention", "prefill, dense", "prefill, HiDrop-64", "speed-up", "training step speed-up", "FLOPs ratio",
             "peak memory ratio"),
            [_trained(row) for row in rows],
        ),
        table(
            ("attention", "prefill with overlap", "speed-up by it", "decode step, dense", "decode step, HiDrop-64",
             "speed-up", "selection in a prefill", "host syncs, dense / HiDrop-64"),
            [_decoded(row) for row in rows],
        ),
        "A decode step compiled as one graph on a "
        "[static cache](../cache.md#static-caches-and-compiled-steps), as CUDA graphs.",
        table(
            ("attention", "dense", "HiDrop-64", "eager over compiled, dense", "eager over compiled, HiDrop-64",
             "dense over HiDrop-64", "graphs"),
            [[row.attention, *_compiled(row)] for row in rows if row.compiled is not None],
        ),
        "A further question about the same image, with a [prefix](../cache.md#prefixes), against asking anew; "
        "efficiency is the share of time saved over that of FLOPs saved.",
        table(
            ("attention", "policy", "FLOPs saved", "time saved", "efficiency", "asked anew", "with the prefix",
             "making it", "memory"),
            [[row.attention, *_reused(one)] for row in rows for one in row.reuse],
        ),
    ]  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def _trained(row: GpuRow) -> list[str]:
    found = row.inference
    return [
        row.attention,
        _milliseconds(found.dense_prefill_seconds),
        _milliseconds(found.policy_prefill_seconds),
        _spread(found.prefill_speedup),
        _spread(row.train.step_speedup),
        f"{row.train.flops_ratio:.3f}",
        f"{row.train.peak_memory_ratio:.3f}",
    ]


def _decoded(row: GpuRow) -> list[str]:
    found = row.inference
    return [
        row.attention,
        _milliseconds(found.overlap_prefill_seconds),
        _spread(found.overlap_speedup),
        _milliseconds(found.dense_decode_seconds),
        _milliseconds(found.policy_decode_seconds),
        _spread(found.decode_speedup),
        _milliseconds(found.selection_seconds),
        _syncs(row),
    ]


def _compiled(row: GpuRow) -> list[str]:
    found = row.compiled
    assert found is not None
    return [
        _milliseconds(found.compiled_dense_seconds),
        _milliseconds(found.compiled_policy_seconds),
        *(_spread(one) for one in (found.dense_gain, found.policy_gain, found.speedup)),
        f"{found.graphs}",
    ]


def _reused(row: ReuseRow) -> list[str]:
    return [
        f"`{row.policy}`",
        f"{row.flops_saved:.1%} of FLOPs",
        f"{row.time_saved.median:.1%} of time",
        _spread(row.efficiency),
        _milliseconds(row.anew_seconds),
        _milliseconds(row.again_seconds),
        _milliseconds(row.making_seconds),
        f"{row.prefix_bytes / _MIB:.1f} MiB",
    ]


def _syncs(row: GpuRow) -> str:
    counts = (row.inference.dense_host_syncs, row.inference.policy_host_syncs)
    return " / ".join("-" if count is None else str(count) for count in counts)


def _milliseconds(spread: Spread) -> str:
    return f"{1000 * spread.median:.1f} ms [{1000 * spread.low:.1f} .. {1000 * spread.high:.1f}]"


def _spread(spread: Spread) -> str:
    return f"{spread.median:.3f} [{spread.low:.3f} .. {spread.high:.3f}]"
