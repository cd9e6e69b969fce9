"""Finished measurements on disk, one JSON file each, so that an interrupted run continues where it stopped."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, uint8

from dropflow import Policy
from dropflow.policy.recorded import WEIGHTS
from dropflow_lab.errors import shortened
from dropflow_lab.files import file_name, write_text

_ENGINE = "dropflow"
_INSTRUMENTS = ("dropflow_lab.compare.answers", "dropflow_lab.compare.cost", "dropflow_lab.measure")


@dataclass(frozen=True)
class Finished:
    """A folder of finished measurements; file names are derived from what was measured and on what."""

    folder: Path

    def read(self, name: str, facts: Mapping[str, Any], parse: Callable[[Any], Any] = lambda found: found) -> Any:
        """Return the measurement under these facts, converted from plain data by `parse`, or `None` if there is none.

        A file that is damaged, or that `parse` rejects with `ValueError`, is reported on stderr and counts as none.
        """
        path = self._path(name, facts)
        if not path.is_file():
            return None
        try:
            return parse(json.loads(path.read_text(encoding="utf-8"))["measured"])
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            print(f"{path}: damaged, measuring again: {shortened(str(error))}", file=sys.stderr)
            return None

    def write(self, name: str, facts: Mapping[str, Any], measured: Any) -> None:
        """Write atomically, so that a killed run leaves no partial file."""
        write_text(self._path(name, facts), json.dumps({"measured": measured, "facts": facts}, indent=2))

    def _path(self, name: str, facts: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"{file_name(name)}-{digest}.json"


def digest_of_weights(model: Any) -> str:
    """Return a digest of all weights and their names, with those of stages that are saved beside the model."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(weight))
    beside = Path(getattr(model, "name_or_path", ""), WEIGHTS)
    if beside.is_file():
        digest.update(beside.read_bytes())
    return digest.hexdigest()


def digest_of_code(policy: Policy | None) -> str:
    """Return a digest of the source code of the engine, the instruments, and the packages of the policy's stages."""
    used = [] if policy is None else [use.stage.__module__.partition(".")[0] for use in policy.stages.values()]
    digest = hashlib.sha256(version(_ENGINE).encode())
    for package in sorted({_ENGINE, *_INSTRUMENTS, *used}):
        for path in _sources(package):
            digest.update(f"{package}/{path.name}".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources(package: str) -> Iterable[Path]:
    module = importlib.import_module(package)
    folders = [Path(folder) for folder in getattr(module, "__path__", ())]
    single = [Path(module.__file__)] if not folders and module.__file__ else []
    return sorted([*single, *(path for folder in folders for path in folder.rglob("*.py"))])


def _bytes(weight: Tensor) -> bytes:
    return bytes(weight.detach().cpu().contiguous().flatten().view(uint8).numpy().tobytes())
