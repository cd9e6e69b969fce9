"""Finds hidden states and named arguments in a module's call."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a layer."""
    hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return hidden


def with_hidden(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Arguments of a layer with its hidden states replaced."""
    if "hidden_states" in kwargs:
        return args, kwargs | {"hidden_states": hidden}
    return (hidden, *args[1:]), kwargs


def named(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments with positional ones passed by name, so that hooks find them."""
    if not args:
        return args, kwargs
    names = parameters_of(module)[: len(args)]
    return (), dict(zip(names, args, strict=True)) | kwargs


def parameters_of(module: Any) -> tuple[str, ...]:
    """Names of the parameters of a module's forward, without `self` and `**kwargs`."""
    return tuple(name for name, kind, _ in _parameters(type(_inner(module)).forward)[1:] if kind != "var")


def annotated_parameters(module: Any) -> dict[str, Any] | None:
    """Parameters of a module's forward with their annotations; `**kwargs` is `kwargs`, whatever its name.

    `None` where the forward takes anything, as wrappers do.
    """
    found = _parameters(type(_inner(module)).forward)[1:]
    if all(kind == "var" for _, kind, _ in found):
        return None
    return {"kwargs" if kind == "var" else name: annotation for name, kind, annotation in found}


def _inner(module: Any) -> Any:
    """The module inside a wrapper of torch.compile or activation checkpointing."""
    for name in ("_orig_mod", "_checkpoint_wrapped_module"):
        module = module._modules.get(name, module)
    return module


@lru_cache(maxsize=256)
def _parameters(forward: Any) -> tuple[tuple[str, str, Any], ...]:
    """Name, `var` for `*args` and `**kwargs`, and annotation."""
    found = inspect.signature(forward).parameters.values()
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple((one.name, "var" if one.kind in several else "", one.annotation) for one in found)


def cache_in(arguments: dict[str, Any]) -> tuple[str | None, Any]:
    """Name and value of the KV cache among the arguments of a call, found by its type; `None` where there is none.

    transformers names it `past_key_values` up to 5.23 and `cache` from 5.24 on.
    """
    for name, value in arguments.items():
        if isinstance(value, Cache):
            return name, value
    return None, None


def cache_after(arguments: dict[str, Any], output: Any) -> Any:
    """The KV cache that a call has written, passed to it or returned in its output; `None` for none."""
    _, cache = cache_in(arguments)
    if cache is not None:
        return cache
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
    return next((value for value in values if isinstance(value, Cache)), None)
