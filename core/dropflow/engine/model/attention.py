"""Attention probabilities of a few query rows, from q and k, without ever forming a queries x keys map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class QueryKey:
    """What one attention layer computes with: q and k behind q/k-norm and RoPE, and the mask it was given."""

    query: Float[Tensor, "batch heads queries dim"]
    key: Float[Tensor, "batch kv_heads keys dim"]
    mask: Tensor | None
    """(batch, heads or 1, queries, keys) boolean or additive, (batch, keys) boolean, or `None`."""
    scaling: float
    causal: bool
    softcap: float | None = None
    sliding_window: int | None = None
    """Only where the kernel enforces the window itself (a two-dimensional mask or none)."""
    rotary: Any = None
    """The `position_embeddings` that a text decoder's layer was given, for its queries; `None` where it got none."""


def row_attention(layer: QueryKey, rows: Int[Tensor, "batch rows"]) -> Float[Tensor, "batch heads rows keys"]:
    """Attention probabilities of the query rows `rows`, equal to those rows of the eager model's map.

    Grouped KV heads are shared without repeating keys. Softmax runs in float32; the result has q's dtype.
    """
    _, heads, _, dim = layer.query.shape
    return attend(layer, layer.query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, dim)), rows)


def attend(
    layer: QueryKey, query: Float[Tensor, "batch heads rows dim"], rows: Int[Tensor, "batch rows"]
) -> Float[Tensor, "batch heads rows keys"]:
    """The same for q of the rows given apart; of `layer.query` only the shape is read."""
    batch, heads, count, dim = query.shape
    kv_heads = layer.key.shape[1]
    picked = query.reshape(batch, kv_heads, heads // kv_heads * count, dim)  # query heads of one KV head are adjacent
    scores = picked @ layer.key.transpose(-1, -2) * layer.scaling
    scores = scores.view(batch, heads, count, -1)
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    bias = row_bias(layer, rows)
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    return torch.softmax(scores, -1, dtype=torch.float32).nan_to_num(0.0).to(query.dtype)


def row_bias(layer: QueryKey, rows: Int[Tensor, "batch rows"]) -> Tensor | None:
    """The rows' part of the mask: (batch, heads or 1, rows, keys), boolean (true: seen) or additive, or `None`."""
    mask, batch, keys = layer.mask, rows.shape[0], layer.key.shape[2]
    if mask is not None and mask.dim() == 4:
        mask = mask.expand(batch, *mask.shape[1:])
        index = rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        return mask.gather(2, index)
    seen = None if mask is None else mask.bool()[:, None, None, :]
    if layer.causal:
        own = rows + keys - layer.query.shape[2]  # bottom-right alignment: the last query sees all keys
        key = torch.arange(keys, device=rows.device)
        causal = key <= own[:, None, :, None]
        if layer.sliding_window is not None:
            causal &= key > own[:, None, :, None] - layer.sliding_window
        seen = causal if seen is None else seen & causal
    return seen
