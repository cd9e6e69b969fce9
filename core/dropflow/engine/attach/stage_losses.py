"""The losses that stages add to training: summed over a call, and added to the model's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dropflow.engine.decoder.head import shifted


def summed(losses: Sequence[Tensor]) -> Tensor | None:
    """The sum of the losses of a call, on the device of the first; `None` if there are none."""
    return torch.stack([loss.to(losses[0]) for loss in losses]).sum() if losses else None


def share_of_step(labels: Tensor, arguments: Mapping[str, Any]) -> Tensor | float:
    """The part of an optimiser's step that this call is, if its loss is normalised over the labels of the whole step.

    A trainer that accumulates gradients passes `num_items_in_batch`, divides nothing itself, and adds the losses up;
    terms that are no sum over labels then count by the labels that stand beside them. 1 in all other calls.
    """
    total = arguments.get("num_items_in_batch")
    if total is None:
        return 1.0
    share: Tensor | float = (shifted(labels) != -100).sum() / total
    return share


def with_losses(output: Any, extra: Tensor) -> Any:
    """The output of a model with `extra` added to its loss, which is its first entry."""
    if isinstance(output, tuple):
        return (output[0] + extra.to(output[0]), *output[1:])
    output["loss"] = output["loss"] + extra.to(output["loss"])
    return output
