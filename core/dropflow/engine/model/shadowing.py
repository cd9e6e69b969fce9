"""The one way in which the engine puts something over what stands in somebody else's object.

Attributes of an instance are entries of its `__dict__`, submodules entries of `_modules`. What stood there, an instance
attribute of another library's included, comes back; what somebody has put over ours in the meantime stays.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

_ABSENT = object()


class Shadows:
    """What lies over the objects of one model, the latest last.

    Each is noted before it is laid, so that `lift_all` finds it at whatever line the engine was interrupted.
    """

    def __init__(self) -> None:
        self._laid: list[_Shadow] = []

    @contextmanager
    def over(self, mapping: MutableMapping[str, Any], name: str, value: Any) -> Iterator[None]:
        """Let `mapping[name]` be `value` inside the block."""
        shadow = self.lay(mapping, name, value)
        try:
            yield
        finally:
            shadow.lift()
            self._laid.remove(shadow)

    def lay(self, mapping: MutableMapping[str, Any], name: str, value: Any) -> _Shadow:
        """Let `mapping[name]` be `value` until `lift_all`."""
        shadow = _Shadow(mapping, name, value)
        self._laid.append(shadow)
        shadow.lay()
        return shadow

    def lift_all(self) -> None:
        """Put back all that lies, the latest first; may be interrupted and called again."""
        while self._laid:
            self._laid[-1].lift()
            self._laid.pop()


class _Shadow:
    """One value over one entry of a mapping."""

    def __init__(self, mapping: MutableMapping[str, Any], name: str, value: Any) -> None:
        self._mapping, self._name, self._value = mapping, name, value
        self._before = mapping.get(name, _ABSENT)
        self._lifted = False

    def lay(self) -> None:
        self._mapping[self._name] = self._value

    def lift(self) -> None:
        if self._lifted or self._mapping.get(self._name, _ABSENT) is not self._value:
            return
        if self._before is _ABSENT:
            del self._mapping[self._name]
        else:
            # one statement, which no interrupt divides: a value such as False might stand there by its own right later
            self._mapping[self._name], self._lifted = self._before, True
