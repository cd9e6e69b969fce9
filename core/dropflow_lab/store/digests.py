"""Digests of what decides a measurement: weights, questions and source code."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, uint8

from dropflow import Policy
from dropflow.policy.recorded import WEIGHTS
from dropflow_lab.inputs.data import Sample

_ENGINE = "dropflow"


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


def digest_of_questions(samples: Sequence[Sample]) -> str:
    """Digest of questions, answers and picture names; a picture replaced under the same name is not noticed."""
    digest = hashlib.sha256()
    for sample in samples:
        names = [picture.name for picture in sample.pictures]
        digest.update(repr((names, sample.question, sample.answer, sample.kind)).encode())
        if sample.videos:
            digest.update(repr(sample.videos).encode())
    return digest.hexdigest()


def digest_of_code(policies: Iterable[Policy | None], instruments: Iterable[str]) -> str:
    """Return a digest of the source code of the engine, some instruments, and the packages of the policies' stages.

    `instruments` are dotted names of modules or packages.
    """
    used = {use.stage.__module__.partition(".")[0] for one in policies if one for use in one.stages.values()}
    digest = hashlib.sha256(version(_ENGINE).encode())
    for package in sorted({_ENGINE, *instruments, *used}):
        for path in _sources(package):
            digest.update(f"{package}/{path.name}".encode())
            digest.update(_digest_of_file(path, path.stat().st_mtime_ns))
    return digest.hexdigest()


@cache
def _digest_of_file(path: Path, _changed: int) -> bytes:
    """Digest of a file's content, read again once the file has changed."""
    return hashlib.sha256(path.read_bytes()).digest()


def _sources(package: str) -> Iterable[Path]:
    module = importlib.import_module(package)
    folders = [Path(folder) for folder in getattr(module, "__path__", ())]
    single = [Path(module.__file__)] if not folders and module.__file__ else []
    return sorted([*single, *(path for folder in folders for path in folder.rglob("*.py"))])


def _bytes(weight: Tensor) -> bytes:
    return bytes(weight.detach().cpu().contiguous().flatten().view(uint8).numpy().tobytes())
