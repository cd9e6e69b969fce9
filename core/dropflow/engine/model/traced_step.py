"""A decode step as `torch.compile` sees it: the model's own code, with a mask and positions for each layer.

A step on a static cache needs nothing else of the engine, so compiled code skips its hooks, which cannot be compiled.
Dynamo traces this module and everything else whose code belongs into such a graph (`backbone.compiling.COMPILED`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import torch
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin, StaticLayer

from dropflow.backbone.compiling import is_traced
from dropflow.errors import UnsupportedCall

FIXED = (StaticLayer, LinearAttentionCacheLayerMixin)
"""Layers of a static cache that are the model's own: their masks fit, or they have a state of fixed size."""


class TracedPolicy:
    """One of the policies of an attached model, named by the static caches that compiled steps may use under it."""

    def __init__(self, name: str, step: TracedStep) -> None:
        self.name, self.step = name, step

    def __deepcopy__(self, memo: Any) -> TracedPolicy:
        """A copied cache stays one of this policy."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled cache is of no model; hooks serve it."""
        return _none, ()


class TracedStep:
    """The decode steps of one attached model that compiled code runs by itself.

    One graph serves all policies of a set: its guards say that a cache names the policy that its caller chooses, and
    not which one that is.
    """

    def __init__(self, rotary: Any, stated: ContextVar[Any]) -> None:
        """`rotary` is what makes position embeddings of states and position ids (batch, tokens).

        `stated` holds a weak reference to the block in which a caller chooses a policy; unset outside blocks.
        """
        self.rotary = rotary
        self._stated = _readable(stated)
        self.serve(("",), "")
        self._sizes: tuple[int, ...] | None = None
        self._vary = False
        self.runs = False
        """Whether the layers of such a step are about to run. In one graph this is never seen from outside; where a
        graph breaks, it lasts until the layers have run."""
        self.open = False
        """Whether compiled code has begun such a step of this model, which may read the caches that it fixed."""

    def serve(self, names: Iterable[str], default: str) -> None:
        """Serve the policies of these names, of which a caller that chooses none has `default`."""
        self.policies = {name: TracedPolicy(name, self) for name in names}
        self.default = self.policies[default]
        self._several = len(self.policies) > 1

    def vary(self, sizes: tuple[int, ...]) -> bool:
        """Whether caches come with layers of different sizes, of which `sizes` are those of one.

        The first code is compiled for one size of each layer, as without a policy; then that of all layers is free at
        once, for torch would free those that change from call to call, and compile anew for others.
        """
        self._vary = self._vary or self._sizes not in (None, sizes)
        self._sizes = sizes
        return self._vary

    def _chosen(self) -> Any:
        """The policy that the caller chooses."""
        if not self._several:
            return self.default
        stated = self._stated.value
        block = None if stated is self._stated else stated()
        return self.default if block is None else block.value

    def serves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call is one token per sample on a static cache, for which layers need masks and positions at most.

        Of positional arguments, only the first one is known: some families pass the token ids so.
        """
        tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = args[0] if args else kwargs.get("input_ids")
        if len(args) > 1 or tokens is None or tokens.size(1) != 1:
            return False
        for name, value in kwargs.items():
            if value is not None and (name.startswith("pixel_values") or name == "mm_encoder_outputs"):
                return False
        cache = _cache_in(kwargs)
        if cache is None:
            return False
        chosen = self._chosen()
        for layer in cache.layers:
            traced_by = getattr(layer, "traced_by", None)
            if traced_by is not chosen and not isinstance(layer, FIXED):
                id(traced_by), id(chosen)  # makes guards, which otherwise tell only where two objects are one
                return False
        return True

    def layers(self, layers: list[Any]) -> list[Any]:
        """The layers for a step, each to get what fits its own cache layer."""
        positions: dict[int, Any] = {}
        return [TracedLayer(number, layer, self, positions) for number, layer in enumerate(layers)]

    def compact(self, cache: Any, states: Any, ids: Any) -> dict[int, Any]:
        """Compact position ids and embeddings for each layer, rotated together, whichever layers miss the same tokens.

        `ids` (..., batch, 1) are those of the model, `states` are of the type that embeddings are to have.
        """
        dropped = {number: held.dropped for number, held in enumerate(cache.layers) if getattr(held, "traced_by", None)}
        each = [ids - own.to(ids.device)[:, None] for own in dropped.values()]
        made = self.rotary(states, torch.cat(each, -2))
        if isinstance(made, tuple):
            embeddings = list(zip(*(part.chunk(len(each), -3) for part in made), strict=True))
        else:  # one complex number for cos and sin
            embeddings = list(made.chunk(len(each), -3))
        return dict(zip(dropped, zip(each, embeddings, strict=True), strict=True))


class TracedLayer:
    """Proxy for one layer of a step: it gets the mask and the compact positions that fit its own cache layer."""

    def __init__(self, number: int, layer: Any, step: TracedStep, positions: dict[int, Any]) -> None:
        """`positions` are compact ones by layer, which the first layer of a step makes."""
        self._number, self._layer, self._step, self._positions = number, layer, step, positions

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = _cache_in(kwargs)
        if cache is None or args[0].size(-2) != 1:
            raise UnsupportedCall(
                "torch.compile: a decode step was interrupted, or ran in two threads at once, while it was compiled; "
                "repeat the call"
            )
        held: Any = cache.layers[self._number] if self._number < len(cache.layers) else None
        traced_by = getattr(held, "traced_by", None)
        if traced_by is not None and traced_by.step is self._step:
            mask = kwargs.get("attention_mask")
            if mask is not None:
                kwargs["attention_mask"] = held.mask(mask)
            if held.dropped is not None:
                if not self._positions:
                    self._positions |= self._step.compact(cache, args[0], kwargs["position_ids"])
                kwargs["position_ids"], kwargs["position_embeddings"] = self._positions[self._number]
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
    compiled = is_traced() and step.serves(given[1], given[2])
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
    if is_traced() and step.serves(given[1], given[2]):
        return None
    return hook(*given)


def _none() -> None:
    return None


def _readable(variable: ContextVar[Any]) -> Any:
    """An object whose `value` is that of the variable, and the object itself where the variable is unset.

    Dynamo cannot trace `ContextVar.get`, but reads properties that a builtin function computes, also in its guards.
    """
    return type("Readable", (), {"value": property(variable.get)})()


def _cache_in(kwargs: dict[str, Any]) -> Any:
    for value in kwargs.values():
        if isinstance(value, Cache):
            return value
    return None
