"""`dropflow list`: the names that policies and commands accept."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dropflow_lab.console.commands.options import AsJson
from dropflow_lab.console.commands.output import chatter_to_stderr, emit

if TYPE_CHECKING:
    from rich.table import Table


class Kind(StrEnum):
    """What can be listed."""

    STAGES = "stages"
    POLICIES = "policies"
    ADAPTERS = "adapters"


_COLUMNS: dict[Kind, tuple[str, ...]] = {
    Kind.STAGES: ("summary", "options", "paper"),
    Kind.POLICIES: ("description", "tuned_for"),
    Kind.ADAPTERS: ("summary",),
}


def list_names(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    as_json: AsJson = False,
    into: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Renew the table of stages in a Markdown file instead."),
    ] = None,
) -> None:
    """List the installed stages, policies or adapters, those of third-party packages too."""
    from dropflow_lab.explain import listing
    from dropflow_lab.markdown import renew

    if into is not None:
        if kind is not Kind.STAGES:
            raise typer.BadParameter("only stages are written as Markdown: `dropflow list stages --into FILE`")
        renew(into, "table of stages", listing.stages_in_markdown())
        return
    with chatter_to_stderr():
        find = {Kind.STAGES: listing.stages, Kind.POLICIES: listing.policies, Kind.ADAPTERS: listing.adapters}
        rows = find[kind]()
    unusable = [f"{row['name']}: {row['error']}" for row in rows if "error" in row]
    emit({kind.value: rows}, as_json, _table(kind, rows), *unusable)


def _table(kind: Kind, rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column("name", no_wrap=True)
    for column in _COLUMNS[kind]:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        if "error" not in row:
            table.add_row(row["name"], *(_cell(row[column]) for column in _COLUMNS[kind]))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "any shape"
    if isinstance(value, dict) and value.keys() >= {"layers", "visual_tokens"}:
        return f"{value['layers']} layers, {value['visual_tokens']} visual tokens"
    return ", ".join(value) if isinstance(value, dict) else str(value)
