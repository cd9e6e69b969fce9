"""Runs a decoder layer with a recurrent state or a convolution, or without a mixer, on its live tokens alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dropflow.engine.decoder.layer_arguments import LayerArguments
from dropflow.engine.model.arguments import hidden_of
from dropflow.errors import UnsupportedCall


def run_without_attention(
    number: int,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    arguments: LayerArguments,
    *,
    live: int,
    continues: bool,
) -> Any:
    """The output of layer `number`, whose `live` tokens, over all samples, are in the slots of its hidden states.

    `continues` says whether the layer goes on from a state. A call without a live token leaves states as they are.
    Raises `UnsupportedCall` where padding between a state and the tokens would change it.
    """
    padded, slots = arguments.live.valid is not None, arguments.live
    if not live:
        return hidden_of(args, kwargs)
    if padded and continues:
        raise UnsupportedCall(
            f"layer {number}: goes on from a recurrent state, but samples of this batch keep different numbers of "
            "tokens, and the padding between would decay the state; run one sample at a time"
        )
    if padded and not arguments.site.backbone.neutral_padding(layer):
        raise UnsupportedCall(
            f"layer {number}: its input projection has a bias, so that padding would enter its convolution, and "
            "samples of this batch keep different numbers of tokens; run one sample at a time"
        )
    if not slots.everything and "attention_mask" in kwargs:
        kwargs = kwargs | {
            "attention_mask": _padding_mask(slots.valid, kwargs["attention_mask"], hidden_of(args, kwargs))
        }
    args, kwargs = arguments.restricted(layer, args, kwargs)
    return layer(*args, **kwargs)


def _padding_mask(valid: Tensor | None, given: Tensor | None, hidden: Tensor) -> Tensor | None:
    """The mask (batch, slots) of a recurrent layer, 0 in padding slots; `None` where there are none."""
    if valid is None:
        return None
    return valid.to(hidden.device, given.dtype if given is not None and given.dim() == 2 else hidden.dtype)
