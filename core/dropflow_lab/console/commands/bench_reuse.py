"""`dropflow bench reuse`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from dropflow_lab.console.commands.bench_efficiency import side_of
from dropflow_lab.console.commands.bench_training import Device, DType, Name, Precision
from dropflow_lab.console.commands.options import AsJson, Threads
from dropflow_lab.console.commands.output import chatter_to_stderr, emit

if TYPE_CHECKING:
    from rich.table import Table

    from dropflow_lab.bench.reuse import ReuseBench
    from dropflow_lab.measure.timing import Spread

_QUICK_QUESTIONS = 3
_MIB = 2**20


def reuse(
    questions: Annotated[int, typer.Option(min=2, help="Questions about the image; each is a sample.")] = 20,
    policies: Annotated[
        str, typer.Option(metavar="A,B", help="Comma-separated names or paths; by default three shipped policies.")
    ] = "",
    batch: Annotated[int, typer.Option(min=1, help="Questions that are asked at once; their lengths differ.")] = 1,
    visual_tokens: Annotated[
        int | None, typer.Option(min=1, help="Visual tokens of the image, a square number; by default the shape's.")
    ] = None,
    threads: Threads = 1,
    quick: Annotated[bool, typer.Option("--quick", help=f"{_QUICK_QUESTIONS} questions: a smoke test.")] = False,
    shape: Annotated[
        Name, typer.Option(help="bench: 16 layers, d=512; llava-7b, qwen2.5-vl-7b; tiny, tiny-qwen.")
    ] = Name.bench,
    device: Device = "cpu",
    dtype: Precision = DType.float32,
    as_json: AsJson = False,
) -> None:
    """Time the prefill of further questions about one image, asked anew and with a prefix, in turn.

    Policies are scaled to the depth of the random model. Saved are shares of the prefill of a question asked anew, with
    its image; efficiency is the share of time saved over the share of FLOPs saved. `bare` is the same without an
    engine: the layers run by hand on as many tokens, which shows what the machine allows. On a CPU, times are the CPU
    time of this process. All are medians with quartiles over the questions.
    """
    from dropflow_lab.bench import reuse as bench
    from dropflow_lab.bench.random_llava import SHAPES

    chosen = replace(SHAPES[shape.value], batch=batch, device=device, dtype=dtype.value)
    if visual_tokens is not None:
        chosen = replace(chosen, image_side=side_of(str(visual_tokens)))
    named = [name.strip() for name in policies.split(",") if name.strip()] or list(bench.POLICIES)
    with chatter_to_stderr():
        count = _QUICK_QUESTIONS if quick else questions
        measured = bench.bench_reuse(chosen, questions=count, policies=named, threads=threads)
    emit(measured.to_json(), as_json, _table(measured), _summary(measured))


def _table(measured: ReuseBench) -> Table:
    from rich.table import Table

    table = Table(title="a further question about the same image, with a prefix")
    for column in ("measure", *(row.policy for row in measured.rows)):
        table.add_column(column, overflow="fold", justify="left" if column == "measure" else "right")
    cells = {
        "boundary of the prefix": [str(row.boundary) for row in measured.rows],
        "FLOPs saved": [f"{row.flops_saved:.1%}" for row in measured.rows],
        "FLOPs saved, causal half": [f"{row.causal_flops_saved:.1%}" for row in measured.rows],
        "time saved": [_percent(row.time_saved) for row in measured.rows],
        "efficiency": [_ratio(row.efficiency) for row in measured.rows],
        "efficiency, causal half": [_ratio(row.causal_efficiency) for row in measured.rows],
        "bare: time saved": [_percent(row.bare_saved) for row in measured.rows],
        "bare: efficiency": [_ratio(row.bare_efficiency) for row in measured.rows],
        "asked anew": [_milliseconds(row.anew_seconds) for row in measured.rows],
        "with the prefix": [_milliseconds(row.again_seconds) for row in measured.rows],
        "making the prefix": [_milliseconds(row.making_seconds) for row in measured.rows],
        "pays from question": [str(row.questions_to_pay or "-") for row in measured.rows],
        "memory of the prefix": [f"{row.prefix_bytes / _MIB:.1f} MiB" for row in measured.rows],
    }
    for name, values in cells.items():
        table.add_row(name, *values)
    return table


def _summary(measured: ReuseBench) -> str:
    machine, subject = measured.machine, measured.subject
    return (
        f"{subject.layers} layers, {subject.visual_tokens} visual and {subject.text_tokens} text tokens, half of these "
        f"after the image; batches of {subject.batch}\n{measured.questions} questions, {measured.clock} time, on "
        f"{machine.threads} thread(s) of {machine.cpu}; torch {machine.torch}, transformers {machine.transformers}"
    )


def _percent(spread: Spread) -> str:
    return f"{spread.median:.1%} ({spread.low:.1%} .. {spread.high:.1%})"


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.3f} ({spread.low:.3f} .. {spread.high:.3f})"


def _milliseconds(spread: Spread) -> str:
    return f"{1000 * spread.median:.1f} ms ({1000 * spread.low:.1f} .. {1000 * spread.high:.1f})"
