"""The part of `dropflow bench engine` that follows the efficiency from small images to large ones."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING

import typer

from dropflow_lab.console.commands.output import chatter_to_stderr, emit

if TYPE_CHECKING:
    from rich.table import Table

    from dropflow_lab.bench.efficiency import EfficiencyBench
    from dropflow_lab.measure.timing import Spread


def show(visual_tokens: str, batch: int, *, rounds: int, threads: int, as_json: bool) -> None:
    """Measure and print the efficiency at these numbers of visual tokens, comma-separated; 576 by default."""
    from dropflow_lab.bench import efficiency as bench
    from dropflow_lab.bench.random_llava import SubjectShape

    sides = [side_of(number.strip()) for number in (visual_tokens or "576").split(",")]
    with chatter_to_stderr():
        measured = bench.bench_efficiency(SubjectShape(batch=batch), sides, rounds=rounds, threads=threads)
    emit(measured.to_json(), as_json, _table(measured), _summary(measured))


def side_of(number: str) -> int:
    """Patches along each side of an image of so many; raises `BadParameter` where it would be no square."""
    side = isqrt(int(number)) if number.isdecimal() else 0
    if not side or side**2 != int(number):
        near = f", such as {side**2}" if side else ""
        raise typer.BadParameter(f"expected a square number{near}, got {number}", param_hint="--visual-tokens")
    return side


def _table(measured: EfficiencyBench) -> Table:
    from rich.table import Table

    table = Table(title="a prefill, over that without a policy")
    names = ("visual tokens", "policy", "FLOPs ratio", "speed-up", "efficiency", "bare: efficiency", "time over bare")
    for column in names:
        table.add_column(column, overflow="fold", justify="left" if column == "policy" else "right")
    for row in measured.rows:
        table.add_row(
            str(row.visual_tokens),
            row.policy,
            f"{row.flops_ratio:.2f} / {row.causal_flops_ratio:.2f}",
            _ratio(row.speedup),
            f"{_ratio(row.efficiency)} / {row.causal_efficiency.median:.3f}",
            f"{_ratio(row.bare_efficiency)} / {row.bare_causal_efficiency.median:.3f}",
            _ratio(row.over_bare),
        )
    return table


def _summary(measured: EfficiencyBench) -> str:
    machine, subject = measured.machine, measured.subject
    return (
        f"{subject.layers} layers, {subject.text_tokens} text tokens; batches of {subject.batch}\n"
        "FLOPs with attention as full rectangles / with what causal attention needs, about half\n"
        f"{measured.rounds} rounds, {measured.clock} time, on {machine.threads} thread(s) of {machine.cpu}; "
        f"torch {machine.torch}, transformers {machine.transformers}"
    )


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.3f} ({spread.low:.3f} .. {spread.high:.3f})"
