"""Soft weights of live tokens: what a training stage says about a keep, as the layers after its boundary feel it.

A token of weight w counts, in every softmax of attention, as w tokens like it: log w is added to the scores of its key.
This is the one relaxation with both ends right, because dropping a token is masking its key: w = 1 is the token that
stays and w -> 0 the token that is gone. Its derivative at 1, summed over layers, heads and queries q, is
p_q * (v - out_q) . dL/dout_q, with p_q the attention the token gets and v its value: what the loss gains by its being
seen. Scaling hidden states instead would do next to nothing, since the norm before every attention and MLP takes
a factor out again.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def weighted_mask(
    mask: Tensor, log_weights: Float[Tensor, "batch keys"], dtype: torch.dtype
) -> Float[Tensor, "batch heads queries keys"]:
    """`mask` (batch, heads, queries, keys), boolean or additive, as additive one with `log_weights` on what is seen."""
    hidden = torch.finfo(dtype).min
    seen: Bool[Tensor, "batch heads queries keys"] = mask if mask.dtype == torch.bool else mask > hidden / 2
    added = log_weights[:, None, None, :].to(dtype)
    if mask.dtype != torch.bool:
        return torch.where(seen, mask.to(dtype) + added, mask.to(dtype))
    return torch.where(seen, added, hidden)


def with_positional_mask(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arguments of a layer with `attention_mask`, and what its forward takes before it, given by position.

    Reentrant gradient checkpointing passes gradients to positional arguments alone.
    """
    parameters = inspect.signature(layer.forward).parameters
    names = list(parameters)
    if "attention_mask" not in kwargs or "attention_mask" not in names:
        return args, kwargs
    leading = names[len(args) : names.index("attention_mask") + 1]
    moved = [kwargs.get(name, parameters[name].default) for name in leading]
    return (*args, *moved), {name: value for name, value in kwargs.items() if name not in leading}
