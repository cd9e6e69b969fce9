"""What commands print: the result alone on stdout, as JSON or as tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


@contextmanager
def chatter_to_stderr() -> Iterator[None]:
    """Send to stderr whatever is printed while a command works, so that stdout holds the result alone."""
    with redirect_stdout(sys.stderr):
        yield


def emit(result: Mapping[str, Any], as_json: bool, *shown: RenderableType) -> None:
    """Print `result` as JSON, or else what is `shown` to people."""
    if as_json:
        print(json.dumps(result, indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    for item in shown:
        console.print(item, soft_wrap=isinstance(item, str))


def si(value: float, unit: str = "") -> str:
    """Write a number with four significant digits and a prefix up to tera, such as `421.4 G`."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}".rstrip()
