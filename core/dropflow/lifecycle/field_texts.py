"""Adds the texts under a class's fields to `help()`, where Python itself shows only names and types."""

from __future__ import annotations

import ast
import inspect
import textwrap
from itertools import pairwise
from typing import Any


def field_texts(kind: type) -> dict[str, tuple[str, str]]:
    """Public fields of a class, read from its source: name -> type and the text under the field.

    Empty where there is no source to read.
    """
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    found = {}
    statements = body.body if isinstance(body, ast.ClassDef) else []
    for field, text in pairwise(statements):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        told = text.value.value if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) else None
        if isinstance(told, str) and not field.target.id.startswith("_"):
            found[field.target.id] = ast.unparse(field.annotation), inspect.cleandoc(told)
    return found


class _DocWithFields:
    """A class's `__doc__`, followed by the texts of its fields; the source is read only when `__doc__` is."""

    def __init__(self, doc: str) -> None:
        self._doc = doc

    def __get__(self, instance: Any, owner: type) -> str:
        lines = [inspect.cleandoc(self._doc)]
        for name, (kind, text) in field_texts(owner).items():
            lines += ["", f"{name}: {kind}", textwrap.indent(text, "    ")]
        return "\n".join(lines)


def show_field_texts(kind: Any) -> None:
    """Make `help(kind)` show the texts of its fields; anything but a class with a docstring is left unchanged."""
    doc = vars(kind).get("__doc__") if isinstance(kind, type) else None
    if isinstance(doc, str):  # `python -OO` leaves none
        kind.__doc__ = _DocWithFields(doc)
