"""What the distribution `dropflow-vllm` holds: a selection of the files of `dropflow`, under the same names."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

WHOLE = Path(__file__).resolve().parents[2]
CORE = (
    "__init__.py",
    "errors.py",
    "py.typed",
    "units.py",
    "backbone/__init__.py",
    "backbone/flops.py",
    "engine/__init__.py",
    "engine/tokens/__init__.py",
    "engine/tokens/host.py",
    "engine/vision/__init__.py",
    "engine/vision/encode_only.py",
    "engine/vision/rows.py",
    "lifecycle",
    "operators",
    "policy",
)
"""Files and folders of `dropflow` that need no transformers."""
GROUPS = ("dropflow.stages", "dropflow.policies", "vllm.general_plugins")
"""Entry points that are taken over."""


def whole() -> dict[str, Any]:
    """The pyproject.toml of `dropflow`."""
    return tomllib.loads((WHOLE / "pyproject.toml").read_text(encoding="utf-8"))


def files() -> Iterator[tuple[Path, str]]:
    """Every file with its place in the wheel."""
    for package in whole()["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        source = WHOLE / package
        if source.name == "dropflow":
            roots = [source / part for part in CORE]
        elif package.startswith(("plugins/", "policies/")) or source.name == "dropflow_vllm":
            roots = [source]
        else:
            continue
        for root in roots:
            for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
                if file.is_file() and "__pycache__" not in file.parts:
                    yield file, file.relative_to(source.parent).as_posix()


class Metadata(MetadataHookInterface):
    """Version and entry points of `dropflow`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in what is dynamic."""
        project = whole()["project"]
        metadata["version"] = project["version"]
        metadata["entry-points"] = {group: project["entry-points"][group] for group in GROUPS}


class Contents(BuildHookInterface):  # type: ignore[type-arg]  # hatchling's own configuration
    """The files of the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002  # of hatchling
        """List them."""
        build_data["force_include"] |= {str(file): place for file, place in files()}
