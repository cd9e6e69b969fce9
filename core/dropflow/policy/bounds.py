"""What a policy may hold, and how much of it: checked before anything else reads it."""

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
"""Entries of a policy, and mappings and lists inside of one another."""
KEY, TEXT = 100, 10_000
"""Characters of a key, and of any other text."""

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
"""Of a policy or of a stage in it; files may be called by it."""


def bounded(data: Any, where: str, path: tuple[object, ...] = ()) -> Any:
    """A copy of plain data, with tuples as lists; what is no plain data stays as it is.

    Raises `PolicyError` where there is too much of it, or a key, text or number that no policy has. Messages call the
    whole `where`, and an entry by its path, which `path` begins.
    """
    faults: list[str] = []
    copy = _Copy(where, faults).of(data, path)
    if faults:
        raise PolicyError(listed(faults))
    return copy


class _Copy:
    """Copies one value, and notes the faults of its keys, texts and numbers."""

    def __init__(self, where: str, faults: list[str]) -> None:
        self._where, self._faults, self._entries = where, faults, count(1)

    def of(self, value: Any, path: tuple[object, ...]) -> Any:
        if next(self._entries) > ENTRIES:
            raise PolicyError(f"{self._where}: more than {ENTRIES:,} entries; a policy is shorter")
        if len(path) > DEPTH:
            raise PolicyError(f"{self._where}: more than {DEPTH} levels of mappings and lists, or one inside itself")
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
            yield f"the key {quoted(text)} is there twice, as text and as a number"
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
