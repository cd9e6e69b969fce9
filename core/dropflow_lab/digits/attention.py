"""Plain matmul-softmax-matmul attention for training on a CPU.

The backward of scaled_dot_product_attention takes most of a step on a CPU (torch 2.13); two bf16 matmuls
around a softmax are faster at these sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

FAST = "dropflow-digits-fast"


def fast_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads length head"],
    key: Float[Tensor, "batch heads total head"],
    value: Float[Tensor, "batch heads total head"],
    attention_mask: Float[Tensor, "batch 1 length total"] | None,
    scaling: float,
    prefix_length: int = 0,
    **_: object,
) -> tuple[Float[Tensor, "batch length heads head"], None]:
    """Attend in the dtype of the query; causal modules must bring their additive mask.

    `prefix_length` leading tokens are taken to see none of the tokens behind them, so that part is not
    computed. Raises `ValueError` for a causal module without a mask.
    """
    if attention_mask is None and getattr(module, "is_causal", False) and query.shape[2] > 1:
        raise ValueError(f"expected an additive mask for the causal {type(module).__name__}, got None")
    # Outside autocast, which would run the softmax in float32.
    with torch.autocast("cpu", enabled=False):
        query = query * scaling
        if attention_mask is not None:
            attention_mask = attention_mask.to(query.dtype)
        parts = []
        for rows, seen in ((slice(0, prefix_length), prefix_length), (slice(prefix_length, None), None)):
            if rows.stop != 0:
                mask = None if attention_mask is None else attention_mask[:, :, rows, :seen]
                parts.append(_attend(query[:, :, rows], key[:, :, :seen], value[:, :, :seen], mask))
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return mixed.transpose(1, 2).contiguous(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    scores = query @ key.transpose(2, 3)
    return (scores if mask is None else scores + mask).softmax(-1) @ value


@contextmanager
def use_fast_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run the model with `fast_attention` inside the block, and as before after it."""
    AttentionInterface.register(FAST, fast_attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(FAST)
    try:
        yield
    finally:
        model.set_attn_implementation(before or "sdpa")
