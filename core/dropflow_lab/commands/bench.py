"""`dropflow bench`: measure the engine itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dropflow_lab.commands.options import AsJson
from dropflow_lab.output import chatter_to_stderr, emit

if TYPE_CHECKING:
    from rich.table import Table

    from dropflow_lab.bench.engine import EngineBench
    from dropflow_lab.bench.timing import Spread

app = typer.Typer(help="Measure what the engine costs and what it saves.")

_QUICK_ROUNDS = 3


@app.callback()
def main() -> None:
    """Measure what the engine costs and what it saves."""


@app.command("engine")
def engine(
    repeats: Annotated[int, typer.Option(min=2, help="Rounds; every variant is timed once in each.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"{_QUICK_ROUNDS} rounds: to see that it runs, not to quote.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Time a random model of 16 layers on 576 visual and 64 text tokens, plain and under policies, in turn.

    `noop`: a stage that is asked in front of every layer and keeps everything. `empty`: a policy without stages.
    `control`: no policy either, which shows how far from 1 chance goes on this machine. `reduced`: vision enters at
    layer 4, 140 tokens from layer 5, 9 from layer 8, none from layer 11 (88.9 % fewer on average). Efficiency is the
    speed-up over the FLOPs ratio. All are medians with quartiles over the rounds.
    """
    from dropflow_lab.bench.engine import bench_engine

    with chatter_to_stderr():
        measured = bench_engine(rounds=_QUICK_ROUNDS if quick else repeats, threads=threads)
    emit(measured.to_json(), as_json, _table(measured), _summary(measured))


def _table(measured: EngineBench) -> Table:
    from rich.table import Table

    table = Table("measure", "median", "quartiles", title="ratios to the same model without a policy")
    reduced = measured.reduced
    rows: dict[str, Spread] = {
        "noop: prefill time": measured.noop.prefill_ratio,
        "noop: decode step time": measured.noop.decode_ratio,
        "empty: prefill time": measured.empty.prefill_ratio,
        "empty: decode step time": measured.empty.decode_ratio,
        "control: prefill time": measured.control.prefill_ratio,
        "control: decode step time": measured.control.decode_ratio,
        "reduced: prefill speed-up": reduced.prefill_speedup,
        "reduced: efficiency": reduced.efficiency,
    }
    for name, spread in rows.items():
        table.add_row(name, f"{spread.median:.3f}", f"{spread.low:.3f} .. {spread.high:.3f}")
    table.add_row("reduced: FLOPs ratio", f"{reduced.flops_ratio:.3f}", "")
    return table


def _summary(measured: EngineBench) -> str:
    machine = measured.machine
    return (
        f"KV entries per layer: {' '.join(map(str, measured.reduced.kv_entries))}\n"
        f"{measured.rounds} rounds on {machine.threads} thread(s) of {machine.cpu}; "
        f"torch {machine.torch}, transformers {machine.transformers}"
    )
