"""A transformer layer in two halves: its attention with the residual, then its feed-forward part with the residual.

Both halves are the layer's own forward, run with the other half silenced: a branch that gives zeros leaves the
residual exactly as it was, so that the halves one after the other are the whole layer, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dropflow.backbone.backbone import Sublayers
from dropflow.engine.decoder.probe import Arguments, with_hidden
from dropflow.engine.model.tap import uncompiled


def in_two(layer: nn.Module, parts: Sublayers, arguments: Arguments, between: Callable[[Tensor], Tensor]) -> Any:
    """Run `layer` with `between` applied to the hidden states that its attention leaves.

    Activation checkpointing is off for this layer: a second run in the backward pass would not be in halves.
    """
    args, kwargs = arguments
    with _without_checkpointing(layer):
        with _silent(parts.feed_forward, lambda hidden: hidden.new_zeros(()).expand(hidden.shape)):
            hidden = between(layer.forward(*args, **kwargs))
        with _silent(parts.attention, lambda hidden: (hidden.new_zeros(()).expand(hidden.shape), None)):
            args, kwargs = with_hidden(hidden, args, kwargs)
            return uncompiled(layer)(*args, **kwargs)


@contextmanager
def _silent(module: Any, answer: Callable[[Tensor], Any]) -> Iterator[None]:
    """Let `module` give `answer(hidden states)`; what else shadows its forward, such as offloading, comes back."""
    shadow = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: answer(args[0] if args else kwargs["hidden_states"])
    try:
        yield
    finally:
        del module.forward
        if shadow is not None:
            module.forward = shadow


@contextmanager
def _without_checkpointing(layer: nn.Module) -> Iterator[None]:
    """Layers of transformers checkpoint themselves while `training` is set; their children keep their own flag."""
    training, layer.training = layer.training, False
    try:
        yield
    finally:
        layer.training = training
