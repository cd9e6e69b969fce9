"""Runs a transformer layer in two halves: attention with its residual, then the feed-forward part with its residual.

Each half is the layer's own forward with the other branch silenced: a branch that returns zeros leaves the residual
exactly as it was, so the two halves in sequence equal the whole layer, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dropflow.backbone.backbone import Sublayers
from dropflow.engine.model.arguments import Arguments, hidden_of, with_hidden
from dropflow.engine.model.shadowing import Shadows
from dropflow.engine.model.sharded import gather_shards
from dropflow.engine.model.tap import uncompiled


def in_two(
    layer: nn.Module, parts: Sublayers, arguments: Arguments, between: Callable[[Tensor], Tensor], shadows: Shadows
) -> Any:
    """Run `layer` with `between` applied to the hidden states after its attention.

    Activation checkpointing is off for this layer, because its rerun in the backward pass would not be split. (The
    layers of transformers checkpoint themselves while `training` is set; their children keep their own flag.)
    """
    args, kwargs = arguments
    gather_shards(
        layer, "a stage works inside a layer that trains", with_gradient=_trains(layer, hidden_of(args, kwargs))
    )
    with shadows.over(layer.__dict__, "training", False):
        with shadows.over_forward(parts.feed_forward, _silent(lambda hidden: _zeros_like(hidden))):
            hidden = between(layer.forward(*args, **kwargs))
        with shadows.over_forward(parts.attention, _silent(lambda hidden: (_zeros_like(hidden), None))):
            args, kwargs = with_hidden(hidden, args, kwargs)
            return uncompiled(layer)(*args, **kwargs)


def _trains(layer: nn.Module, hidden: Tensor) -> bool:
    return torch.is_grad_enabled() and (hidden.requires_grad or any(w.requires_grad for w in layer.parameters()))


def _zeros_like(hidden: Tensor) -> Tensor:
    return hidden.new_zeros(()).expand(hidden.shape)


def _silent(answer: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """A forward that returns `answer` of its hidden states and computes nothing."""
    return lambda *args, **kwargs: answer(args[0] if args else kwargs["hidden_states"])
