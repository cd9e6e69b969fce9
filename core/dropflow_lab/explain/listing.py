"""Lists the installed stages, policies and adapters, each with a summary or the reason it cannot be used."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from dropflow import Stage, load_policy
from dropflow.errors import DropflowError
from dropflow.lifecycle.hooks import HOOKS, PROJECT
from dropflow.policy import registry
from dropflow.policy.plan import resolve
from dropflow.units import BackboneShape
from dropflow_lab.markdown import table

Row = dict[str, Any]


def stages() -> list[Row]:
    """Every registered stage with its summary, paper and options."""
    return [_row(name, _stage) for name in registry.names(registry.STAGES)]


def policies() -> list[Row]:
    """Every registered policy with its description, the shape it is tuned for and its file."""
    return [_row(name, _policy) for name in registry.policy_files()]


def adapters() -> list[Row]:
    """Every registered backbone adapter, named after the `model_type` it serves."""
    return [_row(name, _adapter) for name in registry.names(registry.ADAPTERS)]


def _row(name: str, describe: Callable[[str], Row]) -> Row:
    try:
        return {"name": name} | describe(name)
    except DropflowError as error:  # one broken package must not hide the others
        return {"name": name, "error": str(error)}


def _stage(name: str) -> Row:
    stage = registry.load(registry.STAGES, name)
    return {
        "summary": stage.summary,
        "paper": stage.paper,
        "options": {option: field.description for option, field in stage.Options.model_fields.items()},
        "hooks": [hook for hook in HOOKS if hasattr(getattr(stage, hook, None), f"{PROJECT}_impl")],
        "needs": sorted(stage.needs),
        "training_free": stage.training_free,
        "tokens": _tokens(name, stage),
    }


def _tokens(name: str, stage: type[Stage[Any]]) -> str:
    """Return what decides how many visual tokens a stage leaves, judged by its example on LLaVA-1.5-7B's shape."""
    example = {"name": "example", "stages": {"only": {"use": name, **stage.example}}}
    forecast = resolve(load_policy(example), BackboneShape(32, 576)).forecasts["only"]
    if forecast.entry is not None or forecast.exit is not None:
        return "all or none, by layer"
    budgets = [*forecast.keeps.values(), *([] if forecast.encoded is None else [forecast.encoded])]
    if not budgets:
        return "as many as before"
    return "by the data" if any(budget in (None, "data") for budget in budgets) else "as set"


def stages_in_markdown() -> str:
    """Return every registered stage as a Markdown table, as in `docs/methods.md`."""
    head = ("stage", "what it does", "hooks", "needs", "tokens left", "training-free", "knobs", "paper")
    return table(head, [_cells(row) for row in stages() if "error" not in row])


def _cells(row: Row) -> tuple[str, ...]:
    hooks, needs, knobs = (", ".join(f"`{one}`" for one in row[key]) for key in ("hooks", "needs", "options"))
    free = "yes" if row["training_free"] else "no"
    return f"`{row['name']}`", row["summary"], hooks, needs, row["tokens"], free, knobs, row["paper"]


def _policy(name: str) -> Row:
    policy = load_policy(name)
    tuned = policy.tuned_for
    return {
        "description": policy.description,
        "tuned_for": tuned and tuned.model_dump(),
        "path": str(registry.policy_files()[name]),
    }


def _adapter(name: str) -> Row:
    adapter = registry.load(registry.ADAPTERS, name)
    return {"summary": (inspect.getdoc(adapter) or "").partition("\n")[0]}
