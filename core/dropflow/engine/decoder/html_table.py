"""A table for notebooks, in plain HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """A table with a title above and notes below; all text is escaped."""
    lines = [_row("th", head), *(_row("td", row) for row in rows)]
    below = "".join(f"<div>{escape(note)}</div>" for note in notes)
    return f"<div>{escape(title)}</div><table>{''.join(lines)}</table>{below}"


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
