"""Reads a policy: from a registered name, a YAML file or a mapping, with inheritance and overrides."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from dropflow.errors import PolicyError, escaped, nearest, quoted
from dropflow.policy import registry
from dropflow.policy.bounds import DEPTH, bounded
from dropflow.policy.interpolation import existing_key, interpolated
from dropflow.policy.policy import Policy, policy_from_dict
from dropflow.policy.yaml_text import parse_yaml, read_yaml

Source = str | Path | Mapping[str, Any] | Policy


def load_policy(source: Source, overrides: Sequence[str] = ()) -> Policy:
    """Read and validate a policy.

    `source` is a registered name, a path of a YAML file, a mapping, or a `Policy`, which is returned as it is when
    there are no `overrides`. Each override is `path=value`, such as `stages.pyramid.keep.10=343`; the value is YAML,
    and `null` removes an entry. `extends: NAME_OR_PATH` in a file inherits: mappings merge, other values replace.
    `${path.of.an.entry}` stands for another entry of the same policy, and for nothing else. Raises `PolicyError` naming
    each wrong path.
    """
    if isinstance(overrides, str) or not isinstance(overrides, Iterable):
        raise PolicyError(
            f"overrides: expected a list of path=value, such as ['stages.pyramid.keep.10=343'], got {quoted(overrides)}"
        )
    if not isinstance(source, str | PathLike | Mapping | Policy) or source == "":
        raise PolicyError(f"policy: expected a name, a path, a mapping or a Policy, got {quoted(source)}")
    if isinstance(source, Policy):
        if not overrides:
            return source
        source = source.to_dict()
    return policy_from_dict(_plain(source, overrides))


def load_recorded(recorded: Mapping[str, Any], *, allow_downloads: bool = False) -> Policy:
    """Validate a policy that came with a model: it may not inherit, nor name a model to download unless allowed."""
    if "extends" in recorded:
        raise PolicyError("extends: a recorded policy cannot extend another one; record what it inherits")
    return policy_from_dict(_plain(recorded), local_models=not allow_downloads)


def _plain(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The complete policy as plain data, with everything inherited, overridden and interpolated."""
    data = _read(source, base=Path.cwd(), seen=())
    for override in overrides:
        _apply(data, override)
    data = interpolated(bounded(data, "policy"))
    return {str(key): value for key, value in bounded(data, "policy").items()}


def _read(source: str | Path | Mapping[str, Any], base: Path, seen: tuple[Path, ...]) -> dict[Any, Any]:
    if isinstance(source, Mapping):
        data, where, name = _mapping(source, "policy"), base, "unnamed"
    else:
        path = _find(source, base)
        if path in seen:
            raise PolicyError(f"extends: {escaped(path)} inherits from itself")
        if len(seen) == DEPTH:
            raise PolicyError(f"extends: {escaped(path)} ends a chain of more than {DEPTH} files that inherit")
        seen += (path,)
        data, where, name = _mapping(read_yaml(path), escaped(path)), path.parent, path.stem
    parent = data.pop("extends", None)
    if data.get("name") is None:
        data["name"] = name
    if parent is None:
        return data
    if not isinstance(parent, str | Path):
        raise PolicyError(f"extends: expected the name or the path of a policy, got {quoted(parent)}")
    return _merged(_read(parent, where, seen), data)


def _mapping(data: Any, where: str) -> dict[Any, Any]:
    if not isinstance(data, Mapping):
        raise PolicyError(f"{where}: expected a mapping with `stages`, got {_kind(data)}")
    found: dict[Any, Any] = bounded(data, where)
    return found


def _kind(data: Any) -> str:
    """Kind of a file's content, which is not quoted because it may be any file."""
    return {str: "text", list: "a list", type(None): "nothing"}.get(type(data), type(data).__name__)


def _merged(parent: Mapping[Any, Any], child: Mapping[Any, Any]) -> dict[Any, Any]:
    """Mappings merge, other values replace."""
    both = {key: _merged(parent[key], child[key]) for key in child if _is_mapping(parent.get(key), child[key])}
    return {**parent, **child, **both}


def _is_mapping(*values: Any) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def _find(source: str | Path, base: Path) -> Path:
    text = str(source)
    if not isinstance(source, Path) and "/" not in text and not text.endswith(_SUFFIXES):
        files = registry.policy_files()
        if text not in files:
            if os.path.exists(base / text):  # false for a name that is too long or has a NUL byte
                raise PolicyError(
                    f"{escaped(text)}: a file or folder, but no policy: policy files end in .yaml or .yml"
                )
            raise PolicyError(
                f"{escaped(text)}: no such policy; {nearest(text, files)} (name a file by its path, ending in .yaml)"
            )
        return files[text].resolve()
    if not text.endswith(_SUFFIXES):
        raise PolicyError(f"{escaped(text)}: expected the path of a policy file, ending in .yaml or .yml")
    try:
        path = (base / Path(source).expanduser()).resolve()
        found = path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL byte, a loop of links, no such user
        raise PolicyError(f"{escaped(text)}: not a valid file path: {escaped(error, 80)}") from None
    if not found:
        raise PolicyError(f"{escaped(text)}: no such policy file (looked for {escaped(path)})")
    return path


_SUFFIXES = (".yaml", ".yml")


def _apply(data: Any, override: str) -> None:
    """Set `path=value` in nested mappings; a key of the mapping may itself contain a dot, such as 0.25."""
    path, equals, text = override.partition("=") if isinstance(override, str) else ("", "", "")
    if not equals or not path:
        raise PolicyError(f"{quoted(override)}: an override is written path=value, such as stages.pyramid.keep.10=343")
    value = bounded(parse_yaml(text, escaped(path)), escaped(path), (path,))
    node, rest = data, path.strip()
    while True:
        key = existing_key(node, rest)
        if key is None or str(key) == rest:
            break
        node, rest = node[key], rest[len(str(key)) + 1 :]
    if not isinstance(node, dict) or (key is None and "." in rest):
        valid = node if isinstance(node, dict) else {}
        raise PolicyError(f"{escaped(path)}: nothing to override there; {nearest(rest.split('.')[0], map(str, valid))}")
    node[_key(rest) if key is None else key] = value


def _key(text: str) -> Any:
    """A key that an override adds: a number if YAML reads it as one."""
    found = parse_yaml(text, escaped(text))
    return found if isinstance(found, int | float) and not isinstance(found, bool) else text
