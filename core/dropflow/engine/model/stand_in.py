"""Replaces a module's list of layers, so that a call under a policy passes through the engine before every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import nn

from dropflow.backbone.compiling import is_traced
from dropflow.engine.model.shadowing import Shadows
from dropflow.engine.model.traced_step import TracedStep


class Run(Protocol):
    """A pass through the layers of a module."""

    def leaves(self, number: int) -> bool:
        """Whether a layer runs unchanged."""
        ...

    def layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer under the policy."""
        ...


class Step:
    """Proxy for one layer: calls go to the run, everything else to the layer itself.

    It wraps `layer.__call__` from the outside, so it does not affect gradient checkpointing, per-layer
    `torch.compile`, or the hooks of FSDP and offloading.
    """

    def __init__(self, number: int, layer: nn.Module, run: Run) -> None:
        self._number, self._layer, self._run = number, layer, run.layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._number, self._layer, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class StandIn(nn.ModuleList):
    """Replacement for a list of layers that shares its contents, so that both change together.

    While `running` returns a run, iteration and indexing yield steps instead of layers; otherwise it behaves exactly
    like the list. It replaces the list in the owner's `_modules`: code compiled before attaching is guarded by that
    entry, so it is recompiled, and the old code is used again after detaching.
    """

    __slots__ = ("_running", "_traced")
    _running: Callable[[], Run | None]
    _traced: TracedStep | None

    def __init__(self) -> None:
        raise TypeError("a StandIn cannot be constructed; call `stand_in`")

    def __iter__(self) -> Iterator[Any]:
        return iter(self._entries())

    def __getitem__(self, index: Any) -> Any:
        entries = self._entries()
        if isinstance(index, slice) and all(isinstance(entry, nn.Module) for entry in entries):
            return nn.ModuleList(entries[index])
        return entries[index]

    def _entries(self) -> list[Any]:
        layers, traced = list(self._modules.values()), self._traced
        steps = traced is not None and traced.runs
        if traced is not None and steps and is_traced():
            return traced.layers(layers)
        run = self._running()
        if run is None:
            # where a graph broke, what was to be compiled runs as it is
            return traced.layers(layers) if traced is not None and steps else layers
        there = [(number, layer) for number, layer in enumerate(layers) if layer is not None]
        return [layer if run.leaves(number) else Step(number, layer, run) for number, layer in there]


def stand_in(
    shadows: Shadows,
    owner: nn.Module,
    running: Callable[[], Run | None],
    name: str = "layers",
    traced: TracedStep | None = None,
) -> None:
    """Replace `owner.<name>` by a `StandIn` until `shadows` are lifted; does nothing if it already is one.

    Compiled code passes through `traced` instead of a run.
    """
    layers: Any = owner._modules[name]
    if isinstance(layers, StandIn):
        return
    made = StandIn.__new__(StandIn)
    made.__dict__ = layers.__dict__
    object.__setattr__(made, "_running", running)
    object.__setattr__(made, "_traced", traced)
    shadows.lay(owner._modules, name, made)
