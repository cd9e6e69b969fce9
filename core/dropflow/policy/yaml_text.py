"""Reads YAML that may be hostile: plain data alone, from regular files of a bounded size, in bounded time."""

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
"""Size of a policy file; the longest that is shipped has 2,000."""


def read_yaml(path: Path) -> Any:
    """Parse a file; raises `PolicyError` naming it, and quoting nothing but a key or a number of a line."""
    said = escaped(path)
    try:
        text = _bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise PolicyError(f"{said}: no text in UTF-8; a policy is a YAML file") from None
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
        problem = escaped(getattr(error, "problem", None) or "a character that no text has")
        raise PolicyError(
            f"{where}: not plain YAML: {line}{problem}; a policy holds only mappings, lists, numbers and text"
        ) from None


def _bytes(path: Path) -> bytes:
    """Content of a regular file; a pipe or a device is not even opened for reading."""
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(number, "rb") as file:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise ValueError("it is no regular file")
        found = file.read(BYTES + 1)
    if len(found) > BYTES:
        raise ValueError(f"it has more than {BYTES:,} bytes; a policy is shorter")
    return found


def _reason(error: Exception) -> str:
    return escaped(error.strerror if isinstance(error, OSError) and error.strerror else error)


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping says twice, where plain YAML would quietly take the last, and what would grow.

    An alias counts as all that it stands for, so that a few lines cannot stand for millions of entries.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """As PyYAML does it, with depth and size in bounds."""
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
            raise ComposerError(None, None, "an alias that stands for what it is in", node.start_mark)
        size = 1 + sum(self._sizes[id(part)] for part in parts)
        if size > ENTRIES:
            raise ComposerError(None, None, f"more than {ENTRIES:,} entries", node.start_mark)
        return size

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML does it, after the check."""
        seen: set[Any] = set()
        for key, _ in node.value if isinstance(node, MappingNode) else ():
            if not isinstance(key, ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            said = self.construct_object(key)
            if not isinstance(said, Hashable):
                raise ConstructorError(None, None, "a key that is no text or number", key.start_mark)
            if said in seen:
                raise ConstructorError(None, None, f"the key {quoted(said)} is there twice", key.start_mark)
            seen.add(said)
        return super().construct_mapping(node, deep)


_OTHER_BASE = re.compile(r"[-+]?(0[0-9_]+|[^:]+:.*)")
"""010 would be 8 and 1:30 would be 90, which nobody means."""


def _scalar(construct: Callable[[Any, Any], Any], kind: str) -> Callable[[_Loader, Node], Any]:
    """A constructor that says so where a scalar is tagged, or looks, as what it is not."""

    def checked(loader: _Loader, node: Node) -> Any:
        if kind == "number" and _OTHER_BASE.fullmatch(str(node.value)):
            told = f"{quoted(node.value)} is a number to the base 8 or 60 in YAML; write it in decimal"
            raise ConstructorError(None, None, told, node.start_mark)
        try:
            return construct(loader, node)
        except (ValueError, LookupError, ArithmeticError):
            raise ConstructorError(None, None, f"{quoted(node.value)} is no {kind}", node.start_mark) from None

    return checked


_SAFE = yaml.SafeLoader.yaml_constructors
_Loader.yaml_constructors = {
    None: _SAFE[None],
    **{
        f"tag:yaml.org,2002:{tag}": _scalar(_SAFE[f"tag:yaml.org,2002:{tag}"], kind)
        for tag, kind in {"null": "null", "bool": "truth value", "int": "number", "float": "number"}.items()
    },
    **{f"tag:yaml.org,2002:{tag}": _SAFE[f"tag:yaml.org,2002:{tag}"] for tag in ("str", "seq", "map")},
    # a date is text here: no option is one
    "tag:yaml.org,2002:timestamp": yaml.SafeLoader.construct_yaml_str,
}
