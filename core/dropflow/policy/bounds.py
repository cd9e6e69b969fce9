"""Limits on what a policy may contain, and on how much, checked before anything else reads it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema

from dropflow.errors import PolicyError, escaped, listed, quoted
from dropflow.units import LARGEST

ENTRIES, DEPTH = 2_000, 32
"""Most entries in a policy, and most levels of mappings and lists inside one another."""
KEY, TEXT = 100, 10_000
"""Most characters in a key, and in any other text."""

_NAME = re.compile(r"(?!\.+\Z)[A-Za-z0-9._-]{1,100}")


def _plain_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("expected a plain name: up to 100 letters, digits, `.`, `_` and `-`")
    return name


Name = Annotated[
    str,
    AfterValidator(_plain_name),
    WithJsonSchema({"type": "string", "pattern": r"^(?!\.+$)[A-Za-z0-9._-]{1,100}$"}),
]
"""Name of a policy or of a stage in it; files may be named after it."""


def bounded(data: Any, where: str, path: tuple[object, ...] = ()) -> Any:
    """Copy plain data, with tuples as lists; anything that is not plain data stays as it is.

    Raises `PolicyError` where there is too much of it, or where a key, text or number is outside the limits. Messages
    refer to the whole as `where`, and to an entry by its path, which starts with `path`.
    """
    faults: list[str] = []
    copy = _Copy(where, faults).of(data, path)
    if faults:
        raise PolicyError(listed(faults))
    return copy


class _Copy:
    """Copies one value, and collects the faults of its keys, texts and numbers."""

    def __init__(self, where: str, faults: list[str]) -> None:
        self._where, self._faults, self._entries = where, faults, count(1)

    def of(self, value: Any, path: tuple[object, ...]) -> Any:
        if next(self._entries) > ENTRIES:
            raise PolicyError(f"{self._where}: more than {ENTRIES:,} entries; a policy is shorter")
        if len(path) > DEPTH:
            raise PolicyError(
                f"{self._where}: more than {DEPTH} levels of mappings and lists, or one that contains itself"
            )
        if isinstance(value, Mapping):
            self._faults += (f"{self._called(path)}: {fault}" for fault in _key_faults(value))
            return {key: self.of(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.of(item, (*path, place)) for place, item in enumerate(value)]
        self._faults += (f"{self._called(path)}: {fault}" for fault in value_faults(value))
        return value

    def _called(self, path: tuple[object, ...]) -> str:
        return escaped(".".join(map(str, path))) if path else self._where


def _key_faults(mapping: Mapping[Any, Any]) -> Iterator[str]:
    texts: set[str] = set()
    for key in mapping:
        if isinstance(key, bool) or not isinstance(key, str | int | float) or any(value_faults(key)):
            yield f"expected text or a number as a key, got {quoted(key)}"
            continue
        text = str(key)
        if not 0 < len(text) <= KEY:
            yield f"expected keys of 1 to {KEY} characters, got {quoted(key)}"
        elif text in texts:
            yield f"the key {quoted(text)} appears twice, as text and as a number"
        texts.add(text)


def value_faults(value: Any) -> Iterator[str]:
    """What is wrong with one text or number."""
    if isinstance(value, str):
        if len(value) > TEXT:
            yield f"expected at most {TEXT:,} characters, got {len(value):,}"
        elif any(unicodedata.category(c) in {"Cc", "Cs"} and c not in "\n\t" for c in value):
            yield f"expected text without control characters, got {quoted(value)}"
    elif isinstance(value, int | float) and not abs(value) <= LARGEST:
        yield f"expected a number from -{LARGEST:,} to {LARGEST:,}, got {quoted(value)}"
