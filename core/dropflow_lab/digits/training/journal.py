"""What a training run keeps on disk: its resumable state and its JSONL log."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dropflow_lab.files import naming_what_cannot_be_written, replacing


class Journal:
    """The state and the log of one run, kept consistent with each other.

    A run that is killed continues from the last saved state; log lines written after it are dropped, so that
    the finished log reads as if the run had never stopped. `facts` are the settings that a continued run must
    share with the one that it continues.
    """

    def __init__(self, folder: Path, facts: Mapping[str, int | float | str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log_path = folder / "training-log.jsonl"
        self.state_path = folder / "state.pt"
        self.facts = dict(facts)

    def append(self, **fields: object) -> None:
        """Add one line to the log."""
        with self.log_path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(fields) + "\n")

    def save(self, state: dict[str, Any]) -> None:
        """Replace the saved state atomically, so that a killed run leaves the old or the new one."""
        size = self.log_path.stat().st_size if self.log_path.exists() else 0
        with naming_what_cannot_be_written(self.state_path), replacing(self.state_path) as part:
            torch.save({**state, "log_bytes": size, "facts": self.facts}, part)

    def restore(self) -> dict[str, Any] | None:
        """Return the saved state and truncate the log to match; `None`, with an empty log, for a new run.

        Raises `ValueError` if the state is damaged or was saved under other settings.
        """
        state: dict[str, Any] | None = None
        if self.state_path.exists():
            if not zipfile.is_zipfile(self.state_path):
                raise ValueError(f"{self.state_path}: damaged; delete it to train from the beginning")
            state = torch.load(self.state_path, weights_only=True)
            self._check(state["facts"])
        if self.log_path.exists():
            with self.log_path.open("r+b") as log:
                log.truncate(state["log_bytes"] if state else 0)
        return state

    def _check(self, saved: dict[str, int | float | str]) -> None:
        names = sorted(saved.keys() | self.facts.keys())
        differing = [
            f"{name} (saved: {saved.get(name)}, now: {self.facts.get(name)})"
            for name in names
            if saved.get(name) != self.facts.get(name)
        ]
        if differing:
            raise ValueError(
                f"expected the settings of the run saved in {self.state_path}, got other values of "
                f"{', '.join(differing)}; continue with the saved ones or train into another folder"
            )
