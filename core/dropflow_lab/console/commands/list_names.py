"""`dropflow list`: the names that policies and commands accept."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dropflow_lab.console.commands.options import AsJson
from dropflow_lab.console.commands.output import chatter_to_stderr, emit, one_line_each


class Kind(StrEnum):
    """What can be listed."""

    STAGES = "stages"
    POLICIES = "policies"
    ADAPTERS = "adapters"
    MODELS = "models"


_TEXT = {Kind.STAGES: "summary", Kind.POLICIES: "description", Kind.ADAPTERS: "summary", Kind.MODELS: "summary"}
"""The text shown next to a name."""


def list_names(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show all details of one of them instead.")
    ] = None,
    as_json: AsJson = False,
    into: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Update the table of stages or models in a Markdown file instead."),
    ] = None,
) -> None:
    """List the installed stages, policies or adapters, including those of third-party packages, one per line.

    With a name, show its details, such as the options of a stage. `models` lists the model types of transformers that
    turn images and text into text, by building each in miniature: which adapter serves it, or why it is refused.
    """
    from dropflow_lab.explain import listing
    from dropflow_lab.markdown import renew

    if into is not None:
        write = {Kind.STAGES: listing.stages_in_markdown, Kind.MODELS: _models_in_markdown}
        if kind not in write:
            raise typer.BadParameter("only stages and models are written as Markdown: `list stages --into FILE`")
        with chatter_to_stderr():
            renew(into, f"table of {kind.value}", write[kind]())
        return
    with chatter_to_stderr():
        find = {
            Kind.STAGES: listing.stages,
            Kind.POLICIES: listing.policies,
            Kind.ADAPTERS: listing.adapters,
            Kind.MODELS: _models,
        }
        rows = find[kind]()
        rows = rows if name is None else [_named(rows, kind, name)]
    usable = [row for row in rows if "error" not in row]
    unusable = [f"{row['name']}: {row['error']}" for row in rows if "error" in row]
    texts = {row["name"]: row[_TEXT[kind]] for row in usable}
    shown = [one_line_each(texts)] if name is None else [_details(row) for row in usable]
    emit({kind.value: rows}, as_json, *shown, *unusable)


def _named(rows: list[dict[str, Any]], kind: Kind, name: str) -> dict[str, Any]:
    from dropflow.errors import nearest
    from dropflow_lab.errors import InputError

    found = [row for row in rows if row["name"] == name]
    if not found:
        known = [row["name"] for row in rows]
        raise InputError(f"{name}: no such name among the {kind.value}; {nearest(name, known)}")
    return found[0]


def _details(row: dict[str, Any]) -> str:
    """Return one line per field; a mapping has one line per entry."""
    lines = []
    for key, value in row.items():
        label = key.replace("_", " ")
        if isinstance(value, dict):
            lines += [f"{label}:", *(f"  {one}: {text}" for one, text in value.items())]
        else:
            lines.append(f"{label}: {_text(value)}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "any shape"
    return ", ".join(value) or "nothing" if isinstance(value, list) else str(value)


def _models() -> list[dict[str, Any]]:
    from dropflow_lab.backbones.listing import models  # which imports torch, unlike the other lists

    return models()


def _models_in_markdown() -> str:
    from dropflow_lab.backbones.listing import models_in_markdown

    return models_in_markdown()
