"""Soft weights of live tokens: how a training stage's selection affects the layers after its boundary.

In every attention softmax, a token of weight w counts as w copies of itself: log w is added to the scores of its key.
This relaxation is exact at both ends, because dropping a token is masking its key: w = 1 is a token that stays and
w -> 0 a token that is dropped. Its derivative at 1, summed over layers, heads and queries q, is
p_q * (v - out_q) . dL/dout_q, with p_q the attention the token gets and v its value: the effect on the loss of seeing
the token. Scaling hidden states instead would have almost no effect, since the norm before every attention and MLP
cancels a factor.
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
    """`mask` (batch, heads, queries, keys), boolean or additive, made additive with `log_weights` on visible keys."""
    hidden = torch.finfo(dtype).min
    seen: Bool[Tensor, "batch heads queries keys"] = mask if mask.dtype == torch.bool else mask > hidden / 2
    added = log_weights[:, None, None, :].to(dtype)
    if mask.dtype != torch.bool:
        return torch.where(seen, mask.to(dtype) + added, mask.to(dtype))
    return torch.where(seen, added, hidden)


def with_positional_mask(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arguments of a layer in which `attention_mask` and all parameters before it are passed by position.

    Reentrant gradient checkpointing passes gradients only to positional arguments.
    """
    parameters = inspect.signature(layer.forward).parameters
    names = list(parameters)
    if "attention_mask" not in kwargs or "attention_mask" not in names:
        return args, kwargs
    leading = names[len(args) : names.index("attention_mask") + 1]
    moved = [kwargs.get(name, parameters[name].default) for name in leading]
    return (*args, *moved), {name: value for name, value in kwargs.items() if name not in leading}
