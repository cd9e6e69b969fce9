"""A second device on a machine that has one: its tensors lie on the host and say otherwise, and do not mix with others.

What torch refuses for tensors of two GPUs is refused here: every call of a torch function that is given tensors of both
devices raises, but for copies, indices on the host, and numbers (tensors without dimensions) on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

HOST, SECOND = torch.device("cpu"), torch.device("cpu", 1)
COPIES = {"copy_", "__setitem__", "__set__"}
"""What may read one device and write to another."""
PLACED = {"to", "cpu", "cuda", "type_as"}
"""Methods whose result lies where they say."""


class There(Tensor):
    """A tensor on the second device."""

    device = SECOND


class TwoDevices(TorchFunctionMode):  # type: ignore[misc]  # torch leaves it untyped
    """While it is entered, tensors may be made on the second device and moved between both."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        given = list(tensors((args, kwargs)))
        if name in PLACED:
            target, args, kwargs = placed(name, args, kwargs)
        elif kwargs.get("device") is not None:
            target = torch.device(kwargs["device"])
            kwargs["device"] = HOST
        else:
            check(func, name, given, args)
            target = SECOND if any(isinstance(tensor, There) for tensor in given) else HOST
        with torch._C.DisableTorchFunctionSubclass():
            return on(target, func(*args, **kwargs))


def check(func: Any, name: str, given: list[Tensor], args: tuple[Any, ...]) -> None:
    """Raise as torch does where tensors of two devices meet."""
    there = [tensor for tensor in given if isinstance(tensor, There)]
    here = [tensor for tensor in given if not isinstance(tensor, There) and tensor.dim()]
    if not there or not here or name in COPIES:
        return
    if name == "__getitem__" and isinstance(args[0], There):
        return
    raise RuntimeError(f"{resolve_name(func) or name}: expected all tensors to be on the same device, found two")


def placed(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.device, Any, dict[str, Any]]:
    """Where the result of `to` and its like shall lie, and its arguments without a word about it."""
    own, *rest = args
    target: torch.device = HOST if name == "cpu" else own.device
    others = [*rest, *kwargs.values()] if name != "cpu" else []
    for other in others:
        if isinstance(other, Tensor):
            target = other.device
        elif isinstance(other, torch.device) or (isinstance(other, str) and not other.startswith("torch")):
            target = torch.device(other)
    plain = [HOST if isinstance(other, torch.device | str) else other for other in rest]
    return target, (own, *plain), {key: HOST if key == "device" else value for key, value in kwargs.items()}


def tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))


def on(device: torch.device, value: Any) -> Any:
    """The tensors in a result, on one device."""
    if isinstance(value, Tensor):
        kind = There if device == SECOND else Tensor
        return value if isinstance(value, There) == (kind is There) else value.as_subclass(kind)
    if isinstance(value, tuple | list):
        items = [on(device, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def spread(model: Any, device_map: Mapping[str, torch.device]) -> Any:
    """Spread a model over both devices by accelerate, as `device_map` of transformers does."""
    skipped = model._skip_keys_device_placement
    with TwoDevices():
        return dispatch_model(model, device_map, main_device=HOST, force_hooks=True, skip_keys=skipped)
