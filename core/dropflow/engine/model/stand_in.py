"""Stand-ins for a module's layers: what iterates `owner.layers` during one forward meets boundaries in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

RunLayer = Callable[[int, nn.Module, tuple[Any, ...], dict[str, Any]], Any]


class Step:
    """Stands for one layer: a call goes to the active run, everything else to the layer itself.

    It lies outside `layer.__call__`, so outside gradient checkpointing, per-layer `torch.compile` and the hooks of
    FSDP or offloading, none of which notice it.
    """

    def __init__(self, number: int, layer: nn.Module, run: Callable[[], RunLayer]) -> None:
        self._number, self._layer, self._run = number, layer, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run()(self._number, self._layer, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class StandIn:
    """Shadows `owner.layers` for the time of one forward.

    The instance attribute hides the registered `ModuleList`, since `nn.Module.__getattr__` is asked only where normal
    lookup fails; `state_dict`, `named_modules`, PEFT and FSDP see nothing of it.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self._run: RunLayer | None = None
        self._steps: list[Step] = []
        self._layers: Any = None

    def install(self, run: RunLayer) -> None:
        """Let `run` call the layers until `remove`."""
        layers = self.owner._modules["layers"]
        if self._layers is not layers:  # made once, and again should somebody replace the list
            assert isinstance(layers, nn.ModuleList)
            self._layers, self._steps = layers, [Step(i, layer, self._active) for i, layer in enumerate(layers)]
        self._run = run
        self.owner.__dict__["layers"] = self._steps

    def remove(self) -> None:
        """Uncover the owner's own layers; harmless if they are."""
        self.owner.__dict__.pop("layers", None)
        self._run = None

    def _active(self) -> RunLayer:
        assert self._run is not None
        return self._run
