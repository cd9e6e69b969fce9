"""What is installed: stages, policies and adapters, each with a line about it or the reason it cannot be used."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from dropflow import load_policy, registry
from dropflow.errors import DropflowError

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
    options = {option: field.description for option, field in stage.Options.model_fields.items()}
    return {"summary": stage.summary, "paper": stage.paper, "options": options}


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
