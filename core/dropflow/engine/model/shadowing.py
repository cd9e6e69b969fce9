"""Temporarily replaces attributes and submodules of objects that the engine does not own.

Instance attributes are entries of an object's `__dict__`, submodules entries of its `_modules`. The previous value,
even one that another library has set, is restored; a value that replaced ours in the meantime is left in place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

_ABSENT = object()


class Shadows:
    """The active replacements (shadows) in the objects of one model, the latest last.

    Each is recorded before it is laid, so that `lift_all` finds it wherever the engine was interrupted.
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
            self._lift(shadow)

    @contextmanager
    def over_forward(self, module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
        """Redirect this thread's calls of `module` to `forward` inside the block.

        Other threads are not affected: a plain forward that began before a policy was attached takes no turn.
        """
        here, before = threading.get_ident(), module.forward

        def own(*args: Any, **kwargs: Any) -> Any:
            return (forward if threading.get_ident() == here else before)(*args, **kwargs)

        with self.over(module.__dict__, "forward", own):
            yield

    def lay(self, mapping: MutableMapping[str, Any], name: str, value: Any) -> _Shadow:
        """Let `mapping[name]` be `value` until `lift_all`."""
        shadow = _Shadow(mapping, name, value)
        self._laid.append(shadow)
        shadow.lay()
        return shadow

    def lift_all(self) -> None:
        """Undo all replacements, the latest first; safe to interrupt and call again."""
        for shadow in reversed(self._laid.copy()):
            self._lift(shadow)

    def _lift(self, shadow: _Shadow) -> None:
        """Undo one replacement once: an interrupted call's block may end as late as its garbage collection."""
        shadow.lift()
        with suppress(ValueError):
            self._laid.remove(shadow)


class _Shadow:
    """One value that replaces one entry of a mapping."""

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
            self._lifted = True
        else:
            # one statement, so that no interrupt splits it: later, somebody else may set an equal value, such as False
            self._mapping[self._name], self._lifted = self._before, True
