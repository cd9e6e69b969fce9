"""The tables that `dropflow compare` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dropflow_lab.console.commands.output import si

if TYPE_CHECKING:
    from rich.table import Table

    from dropflow_lab.compare.cost import Cost
    from dropflow_lab.compare.rows import Row


def answers(rows: Sequence[Row], apart: Sequence[str]) -> Table:
    """Visual tokens and accuracy, compared with random pruning."""
    from dropflow_lab.compare import cells

    table = _table("visual tokens (average over layers, and at entry) and answers")
    seeds = any(row.by_seed for row in rows)
    _columns(table, "average", "entry", "accuracy", *["by seed"] * seeds, *apart, "agreement", "random", "gain")
    for row in rows:
        table.add_row(
            str(row.title),
            cells.average(row, 2),
            f"{row.entry_visual_tokens:.2f}",
            cells.share(row.accuracy),
            *[", ".join(f"{value:.1%}" for value in row.by_seed)] * seeds,
            *cells.apart(row, apart),
            cells.share(row.agreement),
            cells.control(row),
            cells.gain(row),
        )
    return table


def kinds(rows: Sequence[Row]) -> Table:
    """Accuracy by kind of question."""
    from dropflow_lab.compare import cells

    names = list(dict.fromkeys(kind for row in rows for kind in row.kinds))
    table = _table("accuracy by kind of question")
    _columns(table, *names)
    for row in rows:
        table.add_row(str(row.title), *cells.apart(row, names))
    return table


def costs(rows: Sequence[Row]) -> Table:
    """FLOPs, memory and time."""
    table = _table(
        "cost; prefill and decode are ratios to the model without a policy, parts are shares of its total time"
    )
    work = ("FLOPs", "counted", "KV", "KV at the end", "KV read", "peak")
    _columns(table, *work, "prefill", "decode", "vision", "selection", "rest", "decode part", "sum")
    for row in rows:
        if row.cost is not None:
            table.add_row(str(row.title), *_cost(row.cost))
    return table


def _cost(cost: Cost) -> list[str]:
    from dropflow_lab.compare import cells

    work, times = cost.work, cost.times
    ratios = [cells.NONE] * 2 if times is None else [cells.ratio(times.prefill), cells.ratio(times.decode)]
    return [
        si(work.flops_formula),
        si(work.flops_counted),
        si(work.kv_bytes, "B"),
        si(work.kv_bytes_end, "B"),
        si(work.kv_bytes_read, "B"),
        si(work.peak_bytes, "B"),
        *ratios,
        *cells.parts(cost),
    ]


def _table(title: str) -> Table:
    from rich.table import Table

    table = Table(title=title)
    table.add_column("policy", overflow="fold")
    return table


def _columns(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right")
