"""`dropflow bench video`: what the stages for videos and those on pixels cost and save."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dropflow_lab.console.commands.options import AsJson, Threads
from dropflow_lab.console.commands.output import chatter_to_stderr, emit

if TYPE_CHECKING:
    from rich.table import Table

    from dropflow_lab.bench.video import VideoBench
    from dropflow_lab.measure.timing import Spread

_QUICK_ROUNDS = 3


def video(
    repeats: Annotated[int, typer.Option(min=2, help="Rounds; every variant is timed once in each.")] = 9,
    threads: Threads = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"{_QUICK_ROUNDS} rounds: a smoke test, too few to report.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Time the stages for videos on 16 frames, and those on pixels on a page, with a random Qwen2.5-VL.

    The first on 16 layers of width 512, 512 visual and 64 text tokens: speed-up of the prefill, that divided by the
    ratio of FLOPs (efficiency), and the stage's selection as a share of the prefill without a policy. The second on a
    tower of 8 layers of width 512, and a page of which a quarter is written on: the same for the vision encoder alone.
    All is CPU time of this process, which other programs on the machine do not add to, every policy in turn; medians
    with quartiles over the rounds.
    """
    from dropflow_lab.bench import video as bench

    with chatter_to_stderr():
        measured = bench.bench_video(rounds=_QUICK_ROUNDS if quick else repeats, threads=threads)
    machine = measured.machine
    told = (
        f"{measured.rounds} rounds on {machine.threads} thread(s) of {machine.cpu}; "
        f"torch {machine.torch}, transformers {machine.transformers}"
    )
    emit(measured.to_json(), as_json, _videos(measured), _pages(measured), told)


def _videos(measured: VideoBench) -> Table:
    from rich.table import Table

    table = Table(title="16 frames: the prefill, relative to one without a policy")
    for column in ("stage", "run as", "entry", "speed-up", "FLOPs ratio", "efficiency", "selection", "largest tensor"):
        table.add_column(column, overflow="fold", justify="left" if column in ("stage", "run as") else "right")
    for row in measured.rows:
        table.add_row(
            row.stage,
            row.policy,
            f"{row.entry_share:.1%}",
            _number(row.prefill_speedup),
            f"{row.flops_ratio:.2f}",
            _number(row.efficiency),
            _percent(row.selection_share_of_dense_prefill),
            str(row.largest_tensor),
        )
    short = measured.shorter
    ratios = (_number(short.prefill_speedup), f"{short.flops_ratio:.2f}", _number(short.efficiency))
    table.add_row("-", "a quarter of the frames, no policy", "25.0%", *ratios, "-", "-")
    return table


def _pages(measured: VideoBench) -> Table:
    from rich.table import Table

    table = Table(title="a page: the vision encoder, relative to one without a policy")
    heads = ("stage", "run as", "units", "speed-up", "FLOPs ratio", "over FLOPs", "over tokens", "selection")
    for column in heads:
        table.add_column(column, overflow="fold", justify="left" if column in ("stage", "run as") else "right")
    for row in measured.encoder:
        table.add_row(
            row.stage,
            row.policy,
            f"{row.kept_share:.1%}",
            _number(row.encoder_speedup),
            f"{row.flops_ratio:.2f}",
            _number(row.efficiency),
            _number(row.token_efficiency),
            _percent(row.selection_share_of_dense_encoder),
        )
    return table


def _number(spread: Spread) -> str:
    return f"{spread.median:.3f} ({spread.low:.3f} .. {spread.high:.3f})"


def _percent(share: Spread) -> str:
    return f"{share.median:.2%} ({share.low:.2%} .. {share.high:.2%})"
