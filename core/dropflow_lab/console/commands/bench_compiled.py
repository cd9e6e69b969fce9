"""`dropflow bench compiled`: decode steps compiled as one graph, with and without a policy."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from dropflow_lab.console.commands.bench_efficiency import side_of
from dropflow_lab.console.commands.options import AsJson, Threads
from dropflow_lab.console.commands.output import chatter_to_stderr, emit

if TYPE_CHECKING:
    from rich.table import Table

    from dropflow_lab.bench.compiled_steps import CompiledBench


def compiled(
    visual_tokens: Annotated[str, typer.Option(metavar="N", help="A square number.")] = "576",
    repeats: Annotated[int, typer.Option(min=2, help="Rounds; every variant is timed once in each.")] = 15,
    threads: Threads = 1,
    wall: Annotated[
        bool, typer.Option("--wall", help="Time by the clock, not by the CPU time of the process.")
    ] = False,
    backend: Annotated[str, typer.Option(help="Backend of torch.compile.")] = "inductor",
    as_json: AsJson = False,
) -> None:
    """Time a decode step of a random model of 16 layers, eager and compiled as one graph on a static cache.

    Without a policy and with `hidrop-64` in turn; medians with quartiles over the rounds. `dropflow bench gpu` does the
    same on a GPU, with CUDA graphs.
    """
    from dropflow_lab.bench.compiled_steps import bench_compiled
    from dropflow_lab.bench.random_llava import SubjectShape

    shape = SubjectShape(image_side=side_of(visual_tokens))
    clock = time.perf_counter if wall else time.process_time
    with chatter_to_stderr():
        measured = bench_compiled(shape, backend=backend, rounds=repeats, threads=threads, clock=clock)
    emit(measured.to_json(), as_json, _table(measured), _summary(measured))


def _table(measured: CompiledBench) -> Table:
    from rich.table import Table

    table = Table("", "median", "quartiles", title="a decode step")
    for name, spread in (
        ("eager, no policy, ms", measured.dense_seconds),
        ("eager, hidrop-64, ms", measured.policy_seconds),
        ("compiled, no policy, ms", measured.compiled_dense_seconds),
        ("compiled, hidrop-64, ms", measured.compiled_policy_seconds),
    ):
        table.add_row(name, f"{1e3 * spread.median:.2f}", f"{1e3 * spread.low:.2f} .. {1e3 * spread.high:.2f}")
    for name, spread in (
        ("eager over compiled, no policy", measured.dense_gain),
        ("eager over compiled, hidrop-64", measured.policy_gain),
        ("compiled: no policy over hidrop-64", measured.speedup),
    ):
        table.add_row(name, f"{spread.median:.3f}", f"{spread.low:.3f} .. {spread.high:.3f}")
    return table


def _summary(measured: CompiledBench) -> str:
    machine, subject = measured.machine, measured.subject
    return (
        f"{measured.graphs} graph(s); room for entries per layer: {' '.join(map(str, measured.capacities))}\n"
        f"{subject.layers} layers, {subject.visual_tokens} visual and {subject.text_tokens} text tokens; "
        f"{measured.rounds} rounds, {measured.clock}, on {machine.threads} thread(s) of {machine.cpu}; "
        f"{measured.backend}, torch {machine.torch}, transformers {machine.transformers}"
    )
