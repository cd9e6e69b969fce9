"""A decode step as `torch.compile` sees it: the model's own code, with a mask and positions for each layer.

A step on a static cache needs nothing else of the engine, so compiled code skips its hooks, which cannot be compiled.
Dynamo traces this module and everything else whose code belongs into such a graph (`backbone.wrapped.COMPILED`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin, StaticLayer

from dropflow.errors import UnsupportedCall

FIXED = (StaticLayer, LinearAttentionCacheLayerMixin)
"""Layers of a static cache that are the model's own: their masks fit, or they have a state of fixed size."""


class TracedStep:
    """The decode steps of one attached model that compiled code runs by itself."""

    def __init__(self, rotary: Any = None) -> None:
        """`rotary` is what makes position embeddings of states and position ids (batch, tokens)."""
        self.rotary = rotary
        self.runs = False
        """Whether the layers of such a step are about to run. In one graph this is never seen from outside; where a
        graph breaks, it lasts until the layers have run."""
        self.open = False
        """Whether compiled code has begun such a step of this model, which may read the caches that it fixed."""

    def __deepcopy__(self, memo: Any) -> TracedStep:
        """A copied cache stays one of this model."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled cache is of no model; hooks serve it."""
        return _none, ()

    def serves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call is one token per sample on a static cache, for which layers need masks and positions at most.

        Of positional arguments, only the first one is known: some families pass the token ids so.
        """
        tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = args[0] if args else kwargs.get("input_ids")
        if len(args) > 1 or tokens is None or tokens.shape[1] != 1:
            return False
        for name, value in kwargs.items():
            if value is not None and (name.startswith("pixel_values") or name == "mm_encoder_outputs"):
                return False
        cache = _cache_in(kwargs)
        if cache is None:
            return False
        for layer in cache.layers:
            traced_by = getattr(layer, "traced_by", None)
            if traced_by is not self and not isinstance(layer, FIXED):
                return False
        return True

    def layers(self, layers: list[Any]) -> list[Any]:
        """The layers for a step, each to get what fits its own cache layer."""
        return [TracedLayer(number, layer, self) for number, layer in enumerate(layers)]


class TracedLayer:
    """Proxy for one layer of a step: it gets the mask and the compact positions that fit its own cache layer."""

    def __init__(self, number: int, layer: Any, step: TracedStep) -> None:
        self._number, self._layer, self._step = number, layer, step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = _cache_in(kwargs)
        if cache is None or args[0].shape[-2] != 1:
            raise UnsupportedCall(
                "torch.compile: a decode step was interrupted, or ran in two threads at once, while it was compiled; "
                "repeat the call"
            )
        held: Any = cache.layers[self._number] if self._number < len(cache.layers) else None
        if getattr(held, "traced_by", None) is self._step:
            mask = kwargs.get("attention_mask")
            if mask is not None:
                kwargs["attention_mask"] = held.mask(mask)
            if held.dropped is not None:
                ids = kwargs["position_ids"] - held.dropped[:, None]
                kwargs["position_ids"], kwargs["position_embeddings"] = ids, self._step.rotary(args[0], ids)
        return self._layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def before(hook: Callable[..., Any], step: TracedStep, begins: bool, *given: Any) -> Any:
    """Call a hook of a module, given the module, `args` and `kwargs`, unless compiled code may go on without it.

    With `begins`, the module is the one whose layers are stood in for. A hook that was removed while torch was about to
    call it is given less, and not called: torch collects a module's hooks before it looks up which of them take keyword
    arguments.
    """
    if len(given) != 3:
        return None
    compiled = torch.compiler.is_dynamo_compiling() and step.serves(given[1], given[2])
    step.open = compiled
    if begins:
        step.runs = compiled
    return None if compiled else hook(*given)


def after(hook: Callable[..., Any], step: TracedStep, ends: bool, *given: Any) -> Any:
    """The same for a hook that is also given the module's output."""
    if len(given) != 4:
        return None
    if ends:
        step.runs = step.open = False
    if torch.compiler.is_dynamo_compiling() and step.serves(given[1], given[2]):
        return None
    return hook(*given)


def _none() -> None:
    return None


def _cache_in(kwargs: dict[str, Any]) -> Any:
    for value in kwargs.values():
        if isinstance(value, Cache):
            return value
    return None
