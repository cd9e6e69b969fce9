"""`${path.of.an.entry}` in the texts of a policy: another entry of the same policy, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import count
from typing import Any

from dropflow.errors import PolicyError, escaped, nearest, quoted
from dropflow.policy.bounds import DEPTH, ENTRIES, TEXT

_REFERENCE = re.compile(r"\$\{([^${}:]*)\}")


def interpolated(data: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the policy in which every reference is replaced by the entry that it names.

    A text that is only a reference becomes that entry, of whatever type; inside a longer text the entry is written out.
    Raises `PolicyError` naming the entry whose reference is malformed, names no entry, or leads back to itself.
    """
    resolver = _Resolver(data)
    return {key: resolver.value(item, (str(key),)) for key, item in data.items()}


class _Resolver:
    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data
        self._open: list[str] = []
        self._entries = count(1)

    def value(self, value: Any, path: tuple[str, ...]) -> Any:
        if next(self._entries) > ENTRIES:
            raise PolicyError(f"policy: its references expand to more than {ENTRIES:,} entries")
        if isinstance(value, Mapping):
            return {key: self.value(item, (*path, str(key))) for key, item in value.items()}
        if isinstance(value, list):
            return [self.value(item, (*path, str(place))) for place, item in enumerate(value)]
        return self._text(value, ".".join(path)) if isinstance(value, str) and "${" in value else value

    def _text(self, text: str, where: str) -> Any:
        whole = _REFERENCE.fullmatch(text)
        if whole:
            return self._entry(whole[1].strip(), where)
        if "${" in _REFERENCE.sub("", text):
            raise PolicyError(
                f"{escaped(where)}: expected `${{path.of.an.entry}}` of this policy, got {quoted(text)}; nothing else "
                "is interpolated, not even environment variables"
            )
        written = _REFERENCE.sub(lambda found: self._written(found[1].strip(), where), text)
        if len(written) > TEXT:
            raise PolicyError(f"{escaped(where)}: its references expand to a text of more than {TEXT:,} characters")
        return written

    def _written(self, reference: str, where: str) -> str:
        found = self._entry(reference, where)
        if isinstance(found, Mapping | list):
            raise PolicyError(f"{escaped(where)}: {escaped(reference)} is not text or a number to put into a text")
        return str(found)

    def _entry(self, reference: str, where: str) -> Any:
        if reference in self._open:
            raise PolicyError(f"{escaped(where)}: the reference {quoted(reference)} leads back to itself")
        if len(self._open) == DEPTH:
            raise PolicyError(f"{escaped(where)}: {quoted(reference)} ends a chain of more than {DEPTH} references")
        node: Any = self._data
        rest = reference
        while rest or node is self._data:
            key = existing_key(node, rest)
            if key is None:
                valid = map(str, node) if isinstance(node, Mapping) else ()
                raise PolicyError(
                    f"{escaped(where)}: no entry {quoted(reference)} in this policy; "
                    f"{nearest(rest.split('.')[0], valid)}"
                )
            node, rest = node[key], rest[len(str(key)) + 1 :]
        self._open.append(reference)
        try:
            return self.value(node, tuple(reference.split(".")))
        finally:
            self._open.pop()


def existing_key(node: Any, rest: str) -> Any | None:
    """The longest key of a mapping that a path begins with, if any: a key may itself contain a dot, such as 0.25."""
    keys = [key for key in node if rest == str(key) or rest.startswith(f"{key}.")] if isinstance(node, Mapping) else []
    return max(keys, key=lambda key: len(str(key)), default=None)
