"""Reads YAML that may be hostile: only plain data, from regular files of a bounded size, in bounded time."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

from dropflow.errors import PolicyError, escaped, quoted
from dropflow.policy.bounds import DEPTH, ENTRIES

BYTES = 32_768
"""Largest size of a policy file; the longest shipped one has 2,000 bytes."""


def read_yaml(path: Path) -> Any:
    """Parse a file; raises `PolicyError` that names it, and quotes at most one key or value of it."""
    said = escaped(path)
    try:
        text = _bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise PolicyError(f"{said}: not UTF-8 text; a policy is a YAML file") from None
    except (OSError, ValueError) as error:
        raise PolicyError(f"{said}: cannot be read: {_reason(error)}") from None
    return parse_yaml(text, said)


def parse_yaml(text: str, where: str) -> Any:
    """Parse text; raises `PolicyError` that begins with `where`."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f"line {mark.line + 1}: "
        problem = escaped(getattr(error, "problem", None) or "a character that YAML does not allow")
        raise PolicyError(
            f"{where}: not plain YAML: {line}{problem}; a policy holds only mappings, lists, numbers and text"
        ) from None


def _bytes(path: Path) -> bytes:
    """Content of a regular file; nothing is read from a pipe or a device."""
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(number, "rb") as file:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise ValueError("it is not a regular file")
        found = file.read(BYTES + 1)
    if len(found) > BYTES:
        raise ValueError(f"it has more than {BYTES:,} bytes; a policy is shorter")
    return found


def _reason(error: Exception) -> str:
    return escaped(error.strerror if isinstance(error, OSError) and error.strerror else error)


class _Loader(yaml.SafeLoader):
    """Refuses keys that appear twice in a mapping, of which PyYAML would silently take the last, and huge content.

    An alias counts with all the entries it stands for, so that a few lines cannot expand to millions of entries.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Compose a node as PyYAML does, within the limits on depth and size."""
        self._depth += 1
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # types-pyyaml leaves it out
        if self._depth > DEPTH:
            raise ComposerError(None, None, f"more than {DEPTH} levels of mappings and lists", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and id(node) not in self._sizes:
            self._sizes[id(node)] = self._size(node)
        return node

    def _size(self, node: Node) -> int:
        parts = [part for pair in node.value for part in pair] if isinstance(node, MappingNode) else node.value
        if isinstance(node, ScalarNode):
            return 1
        if any(id(part) not in self._sizes for part in parts):
            raise ComposerError(None, None, "an alias inside the mapping or list that it stands for", node.start_mark)
        size = 1 + sum(self._sizes[id(part)] for part in parts)
        if size > ENTRIES:
            raise ComposerError(None, None, f"more than {ENTRIES:,} entries", node.start_mark)
        return size

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping as PyYAML does, after checking its keys."""
        seen: set[Any] = set()
        for key, _ in node.value if isinstance(node, MappingNode) else ():
            if not isinstance(key, ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            said = self.construct_object(key)
            if not isinstance(said, Hashable):
                raise ConstructorError(None, None, "a key that is not text or a number", key.start_mark)
            if said in seen:
                raise ConstructorError(None, None, f"the key {quoted(said)} appears twice", key.start_mark)
            seen.add(said)
        return super().construct_mapping(node, deep)


_OTHER_BASE = re.compile(r"[-+]?(0[0-9_]+|[^:]+:.*)")
"""010 would be 8 and 1:30 would be 90, which nobody means."""


def _scalar(construct: Callable[[Any, Any], Any], kind: str) -> Callable[[_Loader, Node], Any]:
    """A constructor that raises a clear error for a scalar that is not of the kind its tag or form suggests."""

    def checked(loader: _Loader, node: Node) -> Any:
        if kind == "a number" and _OTHER_BASE.fullmatch(str(node.value)):
            told = f"{quoted(node.value)} is a number to the base 8 or 60 in YAML; write it in decimal"
            raise ConstructorError(None, None, told, node.start_mark)
        try:
            return construct(loader, node)
        except (ValueError, LookupError, ArithmeticError):
            raise ConstructorError(None, None, f"{quoted(node.value)} is not {kind}", node.start_mark) from None

    return checked


_SAFE = yaml.SafeLoader.yaml_constructors
_Loader.yaml_constructors = {
    None: _SAFE[None],
    **{
        f"tag:yaml.org,2002:{tag}": _scalar(_SAFE[f"tag:yaml.org,2002:{tag}"], kind)
        for tag, kind in {"null": "null", "bool": "true or false", "int": "a number", "float": "a number"}.items()
    },
    **{f"tag:yaml.org,2002:{tag}": _SAFE[f"tag:yaml.org,2002:{tag}"] for tag in ("str", "seq", "map")},
    # dates stay text, as no option is a date
    "tag:yaml.org,2002:timestamp": yaml.SafeLoader.construct_yaml_str,
}
