"""Output of commands: only the result goes to stdout, as JSON or as tables that are never truncated."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table


@contextmanager
def chatter_to_stderr() -> Iterator[None]:
    """Redirect to stderr whatever is printed while a command works, so that stdout holds only the result."""
    with redirect_stdout(sys.stderr):
        yield


def emit(result: Mapping[str, Any], as_json: bool, *shown: RenderableType) -> None:
    """Print `result` as JSON, or else its human-readable form, `shown`.

    A table that is wider than the terminal is printed as one block of lines per row, `name: value`. If stdout is not a
    terminal, a table is as wide as it needs to be.
    """
    if as_json:
        print(json.dumps(result, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    for item in shown:
        if isinstance(item, Table):
            _print_whole(console, item)
        else:
            console.print(item, soft_wrap=isinstance(item, str))


def one_line_each(texts: Mapping[str, str]) -> str:
    """Return names with their texts, one line each, truncated at a word if the terminal is narrower."""
    from textwrap import shorten

    from rich.console import Console

    console, width = Console(), max(map(len, texts), default=0)
    room = max(1, console.width - width - 2)
    cut = {name: shorten(text, room, placeholder=" …") for name, text in texts.items()}
    return "\n".join(f"{name:<{width}}  {text}" for name, text in (cut if console.is_terminal else texts).items())


def si(value: float, unit: str = "") -> str:
    """Write a number with four significant digits and a prefix up to tera, such as `421.4 G`."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}".rstrip()


def _print_whole(console: Console, table: Table) -> None:
    from rich.console import Console

    needed = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    if needed <= console.width:
        console.print(table)
    elif console.is_terminal:
        console.print(_records(table), soft_wrap=True)
    else:
        Console(width=needed, highlight=False, markup=False, emoji=False).print(table)


def _records(table: Table) -> str:
    """Return the rows of a table as blocks of lines; empty cells are left out."""
    names = [str(column.header) for column in table.columns]
    blocks = [
        "\n".join(f"{name}: {cell}" if name else str(cell) for name, cell in zip(names, row, strict=True) if cell)
        for row in zip(*(column.cells for column in table.columns), strict=True)
    ]
    return "\n\n".join([*([str(table.title)] if table.title else []), *blocks]) + "\n"
