"""A stand-in for a module's list of layers: who iterates it during a call that prunes meets boundaries in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import nn

from dropflow.engine.model.shadowing import Shadows


class Run(Protocol):
    """A pass through the layers of a module."""

    def leaves(self, number: int) -> bool:
        """Whether a layer runs as it is."""
        ...

    def layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer in the pass's own way."""
        ...


class Step:
    """Stands for one layer: a call goes to the run, everything else to the layer itself.

    It lies outside `layer.__call__`, so outside gradient checkpointing, per-layer `torch.compile` and the hooks of
    FSDP or offloading, none of which notice it.
    """

    def __init__(self, number: int, layer: nn.Module, run: Run) -> None:
        self._number, self._layer, self._run = number, layer, run.layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._number, self._layer, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class StandIn(nn.ModuleList):
    """The list it stands for, sharing all it holds, so that both change together.

    Where `running` gives a run, iteration gives steps instead of layers; at all other times, and to everybody who does
    not iterate, it is the list. It takes the list's place in the owner's `_modules`: code that was compiled before
    attaching is guarded by that entry, so it is compiled anew, and is used again after detaching.
    """

    __slots__ = ("_running",)
    _running: Callable[[], Run | None]

    def __init__(self) -> None:
        raise TypeError("a StandIn is made by `stand_in`")

    def __iter__(self) -> Iterator[Any]:
        return iter(self._entries())

    def __getitem__(self, index: Any) -> Any:
        entries = self._entries()
        if isinstance(index, slice) and not any(isinstance(entry, Step) for entry in entries):
            return nn.ModuleList(entries[index])
        return entries[index]

    def _entries(self) -> list[Any]:
        run, layers = self._running(), list(self._modules.values())
        if run is None:
            return layers
        there = [(number, layer) for number, layer in enumerate(layers) if layer is not None]
        return [layer if run.leaves(number) else Step(number, layer, run) for number, layer in there]


def stand_in(shadows: Shadows, owner: nn.Module, running: Callable[[], Run | None]) -> None:
    """Let a `StandIn` take the place of `owner.layers`, until `shadows` are lifted; harmless when one stands there."""
    layers: Any = owner._modules["layers"]
    if isinstance(layers, StandIn):
        return
    made = StandIn.__new__(StandIn)
    made.__dict__ = layers.__dict__
    object.__setattr__(made, "_running", running)
    shadows.lay(owner._modules, "layers", made)
