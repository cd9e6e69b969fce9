"""Counts where the host would wait for a GPU, on any device."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"}
"""Methods of a tensor that need its values on the host."""
WAITS = {"nonzero", "masked_select", "bincount", "_unique2", "unique_consecutive", "unique_dim", "equal", "allclose"}
"""Operators whose result's shape, or answer, the host must know."""


class HostSyncs(TorchFunctionMode):
    """Collects, while it is entered, the place of every host synchronisation.

    These are reads of a tensor's values, operators whose result's shape depends on values, boolean indices, and copies
    of host data to a device (a tensor made from a list).
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self._operators = _Operators(self._found)

    def __enter__(self) -> HostSyncs:
        self._operators.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._operators.__exit__(*error)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name in READS and args and isinstance(args[0], Tensor):
            self._found(name)
        if name in ("tensor", "as_tensor") and args and isinstance(args[0], list | tuple) and args[0]:
            self._found(name)
        return function(*args, **(kwargs or {}))

    def _found(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and "/syncs.py" not in f.filename]
        callers = (f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-4:]))
        self.places.append(f"{what} at {' < '.join(callers)}")


class _Operators(TorchDispatchMode):
    def __init__(self, found: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = found

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.__name__.split(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        by_mask = any(isinstance(part, Tensor) and part.dtype == torch.bool for part in indices)
        counted = name == "repeat_interleave" and function._overloadname == "Tensor"
        if name in WAITS or by_mask or counted:
            self._tell("boolean index" if by_mask else name)
        return function(*args, **(kwargs or {}))
