"""Finds stages, adapters and policies among the entry points of installed packages, lazily and by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import cache, lru_cache
from importlib import resources
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path
from typing import Any

from dropflow.errors import BrokenPlugin, DuplicateName, UnknownName, nearest

STAGES, ADAPTERS, POLICIES = "dropflow.stages", "dropflow.adapters", "dropflow.policies"


def names(group: str) -> list[str]:
    """Registered names of a group, sorted, without importing what they stand for."""
    return sorted({point.name for point in _points(group)})


def load(group: str, name: str) -> Any:
    """Import what `name` stands for.

    Raises `UnknownName` with the nearest valid names, `DuplicateName` when two packages claim the name, and
    `BrokenPlugin` when its package cannot be imported; other names stay usable in each case.
    """
    points = {point.value: point for point in _points(group).select(name=name)}
    if not points:
        raise UnknownName(f"{group}: nothing is registered as {name!r}; {nearest(name, names(group))}")
    if len(points) > 1:
        owners = ", ".join(f"{owner(p)} ({value})" for value, p in sorted(points.items()))
        raise DuplicateName(f"{group}: {name!r} is registered by {owners}; uninstall one of them")
    return _import(group, next(iter(points.values())))


def _points(group: str) -> EntryPoints:
    return _points_now(group, tuple((folder, _changed(folder)) for folder in sys.path))


@lru_cache(maxsize=8)
def _points_now(group: str, _folders: tuple[tuple[str, int], ...]) -> EntryPoints:
    """Entry points of a group, read again once a folder that packages are imported from has changed."""
    return entry_points(group=group)


def _changed(folder: str) -> int:
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


def owner(point: EntryPoint) -> str:
    """Name of the distribution that registered an entry point."""
    return point.dist.name if point.dist is not None else point.value


def _import(group: str, point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:
        raise BrokenPlugin(
            f"{group}: {point.name!r} of package {owner(point)} cannot be imported from {point.value!r}: {error!r}; "
            "repair or uninstall that package"
        ) from error


def policy_files() -> dict[str, Path]:
    """Every registered policy by name: an entry point names a package, each YAML file in it is one policy."""
    found: dict[str, Path] = {}
    for name, path in _policy_files_of_packages():
        if name in found and found[name] != path:
            raise DuplicateName(
                f"{POLICIES}: the policy {name!r} is in {found[name]} and in {path}; rename one of them"
            )
        found[name] = path
    return dict(sorted(found.items()))


def _policy_files_of_packages() -> Iterator[tuple[str, Path]]:
    for point in _points(POLICIES):
        yield from _yaml_files(point)


@cache
def _yaml_files(point: EntryPoint) -> tuple[tuple[str, Path], ...]:
    folder = resources.files(_import(POLICIES, point))
    return tuple((Path(f.name).stem, Path(str(f))) for f in folder.iterdir() if f.name.endswith((".yaml", ".yml")))
