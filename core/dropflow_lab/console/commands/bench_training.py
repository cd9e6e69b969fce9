"""`dropflow bench train` and `dropflow bench gpu`."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dropflow_lab.console.commands.options import AsJson, Threads
from dropflow_lab.console.commands.output import chatter_to_stderr, emit
from dropflow_lab.files import check_writable, write_text

if TYPE_CHECKING:
    from rich.table import Table

    from dropflow_lab.bench.train import TrainBench
    from dropflow_lab.measure.timing import Spread

_QUICK_ROUNDS = 2


class Name(StrEnum):
    """Shapes of the measured model."""

    bench = "bench"
    llava_7b = "llava-7b"
    qwen_7b = "qwen2.5-vl-7b"
    tiny = "tiny"
    tiny_qwen = "tiny-qwen"


class DType(StrEnum):
    """Precision of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


ShapeName = Annotated[
    Name,
    typer.Option(help="bench: 16 layers, d=512; llava-7b, qwen2.5-vl-7b; tiny, tiny-qwen: smoke tests."),
]
Batch = Annotated[int, typer.Option(min=1, help="Samples per training step, with one image each.")]
Device = Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")]
Precision = Annotated[DType, typer.Option("--dtype", help="Precision of weights and activations.")]
Checkpointing = Annotated[bool, typer.Option("--checkpointing", help="Recompute activations in the backward pass.")]
Rounds = Annotated[int, typer.Option("--repeats", min=2, help="Rounds; both variants are timed once in each.")]
Quick = Annotated[bool, typer.Option("--quick", help=f"{_QUICK_ROUNDS} rounds: a smoke test, too few to report.")]


def train(
    repeats: Rounds = 7,
    threads: Threads = 1,
    quick: Quick = False,
    shape: ShapeName = Name.bench,
    batch: Batch = 4,
    device: Device = "cpu",
    dtype: Precision = DType.float32,
    attention: Annotated[str, typer.Option(help="Attention implementation, by its name in transformers.")] = "sdpa",
    checkpointing: Checkpointing = False,
    as_json: AsJson = False,
) -> None:
    """Time one training step (forward, backward, AdamW) of a random model, dense and through HiDrop-64, in turn.

    Each sample has 576 visual and 64 text tokens; the policy's numbers are scaled to the model's depth. Times are
    medians with quartiles over the rounds. Memory is what torch's allocator holds at the peak of a step, including
    weights, optimiser state and gradients.
    """
    from dropflow_lab.bench.random_llava import SHAPES
    from dropflow_lab.bench.train import bench_train

    chosen = replace(SHAPES[shape.value], batch=batch, device=device, dtype=dtype.value, attention=attention)
    with chatter_to_stderr():
        measured = bench_train(
            chosen, rounds=_QUICK_ROUNDS if quick else repeats, threads=threads, checkpointing=checkpointing
        )
    emit(measured.to_json(), as_json, _table(measured), _circumstances(measured))


def gpu(
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the tables to a Markdown file.")] = None,
    repeats: Rounds = 7,
    threads: Threads = 1,
    quick: Quick = False,
    shape: ShapeName = Name.llava_7b,
    batch: Batch = 4,
    device: Device = "cuda",
    dtype: Precision = DType.bfloat16,
    checkpointing: Checkpointing = False,
    as_json: AsJson = False,
) -> None:
    """Time a random LLaVA-1.5-7B or Qwen2.5-VL-7B on a GPU, dense and through HiDrop-64, in turn.

    Prefill, overlap, decode step, selection, host synchronisations, the reuse of a prefix and a training step.
    Attention is SDPA and, if it is installed, FlashAttention. AdamW in bfloat16 needs 54 GB for weights, gradients and
    its state, plus memory for activations: use a smaller --batch or --checkpointing if that is too much.
    """
    from dropflow_lab.bench.gpu import bench_gpu, device_name
    from dropflow_lab.bench.gpu_page import page, told
    from dropflow_lab.bench.random_llava import SHAPES

    if out is not None:
        check_writable(out.parent)
    chosen = replace(SHAPES[shape.value], batch=batch, device=device, dtype=dtype.value)
    with chatter_to_stderr():
        rows = list(
            bench_gpu(chosen, rounds=_QUICK_ROUNDS if quick else repeats, threads=threads, checkpointing=checkpointing)
        )
    name = device_name(device)
    if out is not None:
        options = f"--shape {shape.value} --batch {batch} --device {device} --dtype {dtype.value} --repeats {repeats}"
        write_text(out, page(rows, name, options + " --checkpointing" * checkpointing))
    emit(
        {"device": name, "rows": [row.to_json() for row in rows]},
        as_json,
        *(f"{name}, {told(row)}\n{_circumstances(row.train)}" for row in rows),
    )


def _table(measured: TrainBench) -> Table:
    from rich.table import Table

    table = Table("measure", "median", "quartiles", title="a training step: dense over policy")
    spreads = {
        "step speed-up": measured.step_speedup,
        "efficiency": measured.efficiency,
        "efficiency, causal half": measured.causal_efficiency,
    }
    for name, spread in spreads.items():
        table.add_row(name, f"{spread.median:.3f}", f"{spread.low:.3f} .. {spread.high:.3f}")
    table.add_row("FLOPs ratio", f"{measured.flops_ratio:.3f}", "")
    table.add_row("FLOPs ratio, causal half", f"{measured.causal_flops_ratio:.3f}", "")
    table.add_row("peak memory ratio", f"{measured.peak_memory_ratio:.3f}", "")
    return table


def _circumstances(measured: TrainBench) -> str:
    machine, giga = measured.machine, 2**30
    return (
        f"dense step {_seconds(measured.dense_step_seconds)}, through the policy "
        f"{_seconds(measured.policy_step_seconds)}; peak {measured.dense_peak_bytes / giga:.2f} and "
        f"{measured.policy_peak_bytes / giga:.2f} GiB, {measured.state_bytes / giga:.2f} of each weights and "
        f"optimiser state\nvisual tokens per layer: {' '.join(map(str, measured.visual_tokens))}\n"
        f"{measured.rounds} rounds, {measured.clock} time, on {machine.threads} thread(s) of {machine.cpu}; "
        f"torch {machine.torch}, transformers {machine.transformers}"
    )


def _seconds(spread: Spread) -> str:
    return f"{1000 * spread.median:.1f} ms [{1000 * spread.low:.1f} .. {1000 * spread.high:.1f}]"
