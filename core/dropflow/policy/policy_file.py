"""Reads a policy: from a registered name, a YAML file or a mapping, with inheritance and overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dropflow.errors import PolicyError, nearest
from dropflow.policy import registry
from dropflow.policy.policy import Policy, policy_from_dict

Source = str | Path | Mapping[str, Any] | Policy


def load_policy(source: Source, overrides: Sequence[str] = ()) -> Policy:
    """Read and validate a policy.

    `source` is a registered name, a path of a YAML file, a mapping, or a `Policy`, which is returned as it is when
    there are no `overrides`. Each override is `path=value`, such as `stages.pyramid.keep.10=343`; the value is YAML,
    and `null` takes an entry away. `extends: NAME_OR_PATH` in a file inherits: mappings merge, other values replace.
    Interpolations (`${...}`) are resolved. Raises `PolicyError` naming each wrong path.
    """
    if isinstance(source, Policy):
        if not overrides:
            return source
        source = source.to_dict()
    merged = _read(source, base=Path.cwd(), seen=())
    try:
        data = OmegaConf.to_container(merged)
        for override in overrides:
            _apply(data, override)
        data = OmegaConf.to_container(OmegaConf.create(data, flags={"allow_objects": True}), resolve=True)
    except OmegaConfBaseException as error:
        raise PolicyError(f"{error.full_key or 'policy'}: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise PolicyError(f"policy: expected a mapping, got {data!r}")
    return policy_from_dict({str(key): value for key, value in data.items()})


def _read(source: str | Path | Mapping[str, Any], base: Path, seen: tuple[Path, ...]) -> DictConfig:
    if isinstance(source, Mapping):
        config, where, name = _config(dict(source), "policy"), base, "unnamed"
    else:
        path = _find(source, base).resolve()
        if path in seen:
            raise PolicyError(f"extends: {path} inherits from itself")
        seen += (path,)
        config, where, name = _config(_parse(path), str(path)), path.parent, path.stem
    parent = config.pop("extends", None)
    if config.get("name") is None:
        config["name"] = name
    return config if parent is None else _merge(_read(parent, where, seen), config)


def _merge(parent: DictConfig, child: DictConfig) -> DictConfig:
    merged = OmegaConf.merge(parent, child)
    assert isinstance(merged, DictConfig)  # both sides are
    return merged


def _config(data: Any, where: str) -> DictConfig:
    if not isinstance(data, Mapping):
        raise PolicyError(f"{where}: expected a mapping with `stages`, got {data!r}")
    return OmegaConf.create(dict(data), flags={"allow_objects": True})


def _find(source: str | Path, base: Path) -> Path:
    text = str(source)
    if isinstance(source, Path) or text.endswith((".yaml", ".yml")) or "/" in text:
        path = base / Path(source).expanduser()
        if not path.is_file():
            raise PolicyError(f"{text}: no such policy file (looked for {path})")
        return path
    files = registry.policy_files()
    if text not in files:
        raise PolicyError(
            f"{text}: no policy is called so; {nearest(text, files)} (a file is named by its path, ending in .yaml)"
        )
    return files[text]


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping says twice, where plain YAML would quietly take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML does it, after the check."""
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            said = self.construct_object(key)
            if said in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"the key {said!r} is there twice", key.start_mark
                )
            seen.add(said)
        return super().construct_mapping(node, deep)


def _parse(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise PolicyError(
            f"{path}: not plain YAML: {reason}; a policy holds only mappings, lists, numbers and strings"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path}: cannot be read: {error}") from None


def _apply(data: Any, override: str) -> None:
    """Set `path=value` in nested mappings; a key of the mapping may itself contain a dot, such as 0.25."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise PolicyError(f"{override!r}: an override is written path=value, such as stages.pyramid.keep.10=343")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise PolicyError(f"{path}: the value {text!r} is not plain YAML") from None
    node, rest = data, path.strip()
    while True:
        key = _existing_key(node, rest)
        if key is None or str(key) == rest:
            break
        node, rest = node[key], rest[len(str(key)) + 1 :]
    if not isinstance(node, dict) or (key is None and "." in rest):
        valid = node if isinstance(node, dict) else {}
        raise PolicyError(f"{path}: nothing to override there; {nearest(rest.split('.')[0], map(str, valid))}")
    node[yaml.safe_load(rest) if key is None else key] = value


def _existing_key(node: Any, rest: str) -> Any | None:
    keys = [k for k in node if rest == str(k) or rest.startswith(f"{k}.")] if isinstance(node, dict) else []
    return max(keys, key=lambda k: len(str(k)), default=None)
