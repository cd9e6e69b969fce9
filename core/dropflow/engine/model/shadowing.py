"""The one way in which the engine puts something over what stands in somebody else's object.

Attributes of an instance are entries of its `__dict__`, submodules entries of `_modules`. What stood there, an instance
attribute of another library's included, comes back; what somebody has put over ours in the meantime stays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

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
            self._lift(shadow)

    @contextmanager
    def over_forward(self, module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
        """Let this thread's calls of `module` go to `forward` inside the block.

        Those of other threads go on as they are: a plain forward that began before a policy was attached takes no turn.
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
        """Put back all that lies, the latest first; may be interrupted and called again."""
        for shadow in reversed(self._laid.copy()):
            self._lift(shadow)

    def _lift(self, shadow: _Shadow) -> None:
        """Harmless when done before: the block of an interrupted call may end as late as the collector finds it."""
        shadow.lift()
        with suppress(ValueError):
            self._laid.remove(shadow)


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
            self._lifted = True
        else:
            # one statement, which no interrupt divides: a value such as False might stand there by its own right later
            self._mapping[self._name], self._lifted = self._before, True
