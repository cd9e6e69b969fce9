"""A CPU stand-in for FlashAttention's contract: a (batch, keys) mask or none, causal aligned at the bottom right.

A sliding window counts the entries that are left once padding is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Unpad each sample, attend, pad again with zeros, as the varlen kernels do."""
    batch, heads, queries, _ = query.shape
    groups = heads // key.shape[1]
    keys = key.shape[2]
    output = torch.zeros_like(query)
    for sample in range(batch):
        real = torch.ones(keys, dtype=torch.bool) if attention_mask is None else attention_mask[sample].bool()
        asks = real[keys - queries :]
        q = query[sample][:, asks]
        k, v = (t[sample][:, real].repeat_interleave(groups, 0) for t in (key, value))
        scores = q @ k.transpose(-1, -2) * kwargs["scaling"]
        if module.is_causal:
            count = q.shape[1]
            seen = torch.ones(count, k.shape[1], dtype=torch.bool).tril(k.shape[1] - count)
            if kwargs.get("sliding_window") is not None:
                seen = seen.triu(k.shape[1] - count - kwargs["sliding_window"] + 1)
            scores = scores.masked_fill(~seen, -torch.inf)
        output[sample][:, asks] = scores.softmax(-1) @ v
    return output.transpose(1, 2), None


@contextmanager
def registered() -> Iterator[str]:
    """Registers the stand-in under a name that transformers takes for FlashAttention."""
    name = "flash_cpu"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, flash_attention_mask)
    try:
        yield name
    finally:
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)
