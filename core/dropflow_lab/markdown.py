"""Builds Markdown tables, and updates them in place in documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from dropflow_lab.errors import InputError
from dropflow_lab.files import write_text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, one line per row."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def renew(document: Path, name: str, text: str) -> None:
    """Put `text` between the lines `<!-- name -->` and `<!-- end of name -->` of a document.

    Raises `InputError` if they are missing.
    """
    before, after = around(document, name)
    write_text(document, f"{before}\n\n{text}\n\n{after}")


def around(document: Path, name: str) -> tuple[str, str]:
    """Return the text up to the line `<!-- name -->` and from `<!-- end of name -->` on; raises as `renew` does."""
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, start, rest = document.read_text(encoding="utf-8").partition(first)
    _, end, after = rest.partition(last)
    if not start or not end:
        raise InputError(f"{document}: expected the lines {first!r} and {last!r}, found no such pair")
    return before + start, end + after
