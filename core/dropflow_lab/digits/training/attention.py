"""Plain matmul-softmax-matmul attention for training on a CPU.

The backward of scaled_dot_product_attention takes most of a step on a CPU (torch 2.13); two bf16 matmuls
around a softmax are faster at these sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

FAST = "dropflow-digits-fast"


def fast_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads length head"],
    key: Float[Tensor, "batch heads total head"],
    value: Float[Tensor, "batch heads total head"],
    attention_mask: Float[Tensor, "batch 1 length total"] | Bool[Tensor, "batch 1 length total"] | None,
    scaling: float,
    prefix_length: int = 0,
    **_: object,
) -> tuple[Float[Tensor, "batch length heads head"], None]:
    """Attend in the dtype of the values; causal modules must pass a mask, additive or True for visible tokens.

    The first `prefix_length` tokens are assumed to see none of the tokens after them, so that part is not computed.
    Raises `ValueError` for a causal module without a mask.
    """
    if attention_mask is None and getattr(module, "is_causal", False) and query.shape[2] > 1:
        raise ValueError(f"expected a mask for the causal {type(module).__name__}, got None")
    # Outside autocast, which would run the softmax in float32.
    with torch.autocast("cpu", enabled=False):
        query, key = (query * scaling).to(value.dtype), key.to(value.dtype)
        if attention_mask is not None:
            attention_mask = _additive(attention_mask, value.dtype)
        parts = []
        for rows, seen in ((slice(0, prefix_length), prefix_length), (slice(prefix_length, None), None)):
            if rows.stop != 0:
                mask = None if attention_mask is None else attention_mask[:, :, rows, :seen]
                parts.append(_attend(query[:, :, rows], key[:, :, :seen], value[:, :, :seen], mask))
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return mixed.transpose(1, 2).contiguous(), None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min / 2)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Build the mask that transformers builds for SDPA, but never omit it."""
    return cast("Tensor | None", sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False}))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    scores = query @ key.transpose(2, 3)
    return (scores if mask is None else scores + mask).softmax(-1) @ value


@contextmanager
def use_fast_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run the model with `fast_attention` inside the block, and restore its attention afterwards."""
    AttentionInterface.register(FAST, fast_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(FAST, _mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(FAST)
    try:
        yield
    finally:
        model.set_attn_implementation(before or "sdpa")
