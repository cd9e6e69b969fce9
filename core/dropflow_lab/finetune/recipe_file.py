"""Reads a recipe: from a shipped name or a YAML file, with inheritance; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dropflow.errors import PolicyError, escaped, listed, nearest, quoted
from dropflow.policy.bounds import DEPTH, bounded
from dropflow.policy.interpolation import interpolated
from dropflow.policy.yaml_text import read_yaml
from dropflow_lab.errors import InputError
from dropflow_lab.finetune.recipe import DenseSteps, OptimizerOptions, Recipe, TrainingStage

_SUFFIXES = (".yaml", ".yml")


def recipe_files() -> dict[str, Path]:
    """Return the shipped recipes by name."""
    folder = Path(str(resources.files("dropflow_lab.finetune"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read and validate a recipe: a shipped name, or the path of a YAML file.

    `extends: NAME_OR_PATH` in a file inherits: mappings merge, other values replace, and null removes an entry. A path
    in `extends` is relative to the file, others to the working directory. `changes` are merged last; what they give for
    `stages` applies to every stage. Nothing is read from the environment. Raises `InputError` naming each wrong path.
    """
    try:
        whole = _plain(source, dict(bounded(changes or {}, "the changes")))
    except PolicyError as error:  # the reader of policies, which words it for them
        raise InputError(str(error).replace("a policy", "a recipe").replace("this policy", "this recipe")) from None
    try:
        return Recipe.model_validate(whole)
    except ValidationError as error:
        raise InputError(listed(_faults(error))) from None


def _plain(source: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the complete recipe as plain data."""
    every = changes.pop("stages", {})
    data = _merged(_read(source, Path.cwd(), ()), changes)
    if every and isinstance(data.get("stages"), Mapping):
        data["stages"] = {
            name: _merged(stage, every) if isinstance(stage, Mapping) else stage
            for name, stage in data["stages"].items()
        }
    found: dict[str, Any] = _without_nulls(interpolated({str(key): value for key, value in data.items()}))
    return found


def _read(source: str, base: Path, seen: tuple[Path, ...]) -> dict[Any, Any]:
    path = _find(source, base)
    if path in seen or len(seen) == DEPTH:
        raise InputError(f"extends: {escaped(path)} inherits from itself, or ends a chain of more than {DEPTH} files")
    data = read_yaml(path)
    if not isinstance(data, Mapping):
        raise InputError(f"{escaped(path)}: expected a recipe, a mapping with `stages`")
    data = dict(bounded(data, escaped(path)))
    parent = data.pop("extends", None)
    if data.get("name") is None:
        data["name"] = path.stem
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise InputError(f"extends: expected the name or the path of a recipe, got {quoted(parent)}")
    return _merged(_read(parent, path.parent, (*seen, path)), data)


def _find(source: str, base: Path) -> Path:
    if "/" not in source and not source.endswith(_SUFFIXES):
        known = recipe_files()
        if source not in known:
            raise InputError(
                f"{escaped(source)}: no such recipe; {nearest(source, known)} (name a file by its path, ending in "
                ".yaml)"
            )
        return known[source]
    try:
        path = (base / Path(source).expanduser()).resolve()
        found = path.suffix in _SUFFIXES and path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{escaped(source)}: not a valid file path: {escaped(error, 80)}") from None
    if not found:
        raise InputError(
            f"{escaped(source)}: no such recipe file, ending in .yaml or .yml (looked for {escaped(path)})"
        )
    return path


def _merged(parent: Mapping[Any, Any], child: Mapping[Any, Any]) -> dict[Any, Any]:
    """Mappings merge, other values replace."""
    both = {
        key: _merged(parent[key], value)
        for key, value in child.items()
        if isinstance(value, Mapping) and isinstance(parent.get(key), Mapping)
    }
    return {**parent, **child, **both}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _faults(error: ValidationError) -> list[str]:
    """One line for each fault: its path, what is wrong, and the nearest valid name of an unknown key."""
    lines = []
    for fault in error.errors(include_url=False):
        path = [escaped(part) for part in fault["loc"] if "[" not in str(part)]
        where = ".".join(path) or "recipe"
        if fault["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown entry; {nearest(path[-1], _model_at(path[:-1]).model_fields)}")
            continue
        message = escaped(fault["msg"].removeprefix("Value error, "))
        if message.startswith("stages."):  # it names its own path
            lines.append(message)
            continue
        got = "" if isinstance(fault["input"], Mapping) else f", got {quoted(fault['input'])}"
        lines.append(f"{where}: {message[0].lower()}{message[1:]}{got}")
    return list(dict.fromkeys(lines))


def _model_at(path: list[str]) -> type[BaseModel]:
    """Return the part of a recipe at a path."""
    match path:
        case ["stages", _, "optimizer"]:
            return OptimizerOptions
        case ["stages", _]:
            return TrainingStage
        case ["dense"]:
            return DenseSteps
    return Recipe
