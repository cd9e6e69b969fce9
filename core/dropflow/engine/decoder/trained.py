"""What the stages of an attached policy train, and how far training has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dropflow.errors import DecisionError


@dataclass(eq=False)
class Trained:
    """The trained modules of one policy's stages."""

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    """Modules by the names of their stages in the policy."""
    progress: float | None = None
    """How far training has come, from 0 to 1; `None` while nobody says."""

    def given(self, name: str) -> dict[str, Any]:
        """The fields of a payload that only the stage `name` gets."""
        return {"module": self.modules.get(name), "progress": self.progress or 0.0}


def checked_loss(loss: Tensor | None, name: str, hook: str) -> list[Tensor]:
    """The loss that a stage's answer carries, as a list of one or none; raises `DecisionError` if it is no scalar."""
    if loss is None:
        return []
    if not isinstance(loss, Tensor):
        raise DecisionError(
            f"stages.{name}: `{hook}` returned a loss of {type(loss).__name__}, expected a float tensor ()"
        )
    if loss.dim() or not loss.is_floating_point():
        raise DecisionError(
            f"stages.{name}: `{hook}` returned a loss of {loss.dtype} {tuple(loss.shape)}, expected a float scalar ()"
        )
    return [loss]
