"""States of recurrent and convolution layers: copied for the samples of a call, and joined from several runs."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

STATES = ("conv_states", "recurrent_states")
"""Attributes of such a cache layer that hold its tensors (batch, ...), by number."""


def has_states(layer: Any) -> bool:
    """Whether a cache layer holds states rather than entries, and some have been written."""
    return isinstance(layer, LinearAttentionCacheLayerMixin) and any(layer.has_previous_state.values())


def tensors_of(layer: Any) -> list[Tensor]:
    """The states that a cache layer holds."""
    return [state for name in STATES for state in getattr(layer, name).values() if state is not None]


def repeated(layer: Any, batch: int) -> Any:
    """A layer with the states of one sample for so many; it shares no tensor with `layer`, which is left as it is."""
    return _with(layer, lambda state: state.repeat(batch, *[1] * (state.dim() - 1)))


def copied(layer: Any) -> Any:
    """The same layer with tensors of its own."""
    return _with(layer, torch.clone)


def chosen(layers: Sequence[Any], where: Sequence[Bool[Tensor, "batch"]]) -> Any:
    """A layer with the states that each sample has in the one of `layers` for which its `where` is true."""
    found = copied(layers[0])
    for layer, own in zip(layers[1:], where[1:], strict=True):
        for name in STATES:
            for number, state in getattr(layer, name).items():
                if state is not None:
                    getattr(found, name)[number][own.to(state.device)] = state[own.to(state.device)]
    return found


def _with(layer: Any, change: Any) -> Any:
    made = copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(made, name, dict(value))
    for name in STATES:
        for number, state in getattr(layer, name).items():
            if state is not None:
                getattr(made, name)[number] = fixed = change(state)
                torch._dynamo.mark_static_address(fixed)  # as transformers does, for compiled steps
    return made
