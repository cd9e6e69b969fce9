"""The settings of a run, which a resumed one must share."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dropflow import Policy
from dropflow_lab.errors import InputError
from dropflow_lab.files import write_text
from dropflow_lab.finetune.checkpoints import checkpoints
from dropflow_lab.finetune.processes import is_first, processes
from dropflow_lab.finetune.recipe import SETTINGS, Recipe

_FREE = ("name", "save_every", "log_every", "policy", "model")
"""Entries of a recipe that a resumed run may change, since no weight depends on them, or that are told otherwise."""


def settings_of(recipe: Recipe, policy: Policy, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a resumed run must share, by name."""
    told = recipe.model_dump(mode="json", exclude=set(_FREE))
    for name, stage in told["stages"].items():
        stage["data"] = stage["data"] if stage["data"] == "digits" else "a folder"
        stage["samples"] = len(data[name])
    return dict(_flat(told | {"policy": policy.to_dict(), "processes": processes()}))


def _flat(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, own in value.items():
        if isinstance(own, Mapping):
            yield from _flat(own, f"{path}{name}.")
        else:
            yield f"{path}{name}", own


def check_start(run: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Raise `InputError` unless a run with these settings may start or continue in this folder."""
    known = run / SETTINGS
    held = known.exists() or any(checkpoints(folder) for folder in run.glob("*") if folder.is_dir())
    if held and not resume:
        raise InputError(f"{run}: holds a run already; continue it with --resume, or train into another folder")
    if resume and not held:
        raise InputError(f"{run}: expected a checkpoint to continue from, found none; leave out --resume")
    if not resume or not known.exists():
        return
    now = json.loads(json.dumps(settings))
    try:
        saved = dict(json.loads(known.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{known}: expected the settings of the run: {error}; delete it if they are the same"
        ) from None
    differing = [name for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name)]
    if differing:
        told = ", ".join(f"{name} (then: {saved.get(name)}, now: {now.get(name)})" for name in differing)
        raise InputError(f"{known}: --resume keeps a run's settings, but these differ: {told}; use the saved ones")


def tell(folder: Path, last: Path | None, faults: Mapping[Path, str]) -> None:
    """Print, once, where a run continues, and what it passes over."""
    if not is_first():
        return
    for checkpoint, fault in faults.items():
        print(f"{checkpoint}: skipped; it has {fault}", file=sys.stderr)
    print(f"continuing from {last or f'the beginning of {folder.name}: no checkpoint was finished'}", file=sys.stderr)


def write_settings(run: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings, from the first process."""
    if is_first():
        write_text(run / SETTINGS, json.dumps(settings, indent=2) + "\n")
