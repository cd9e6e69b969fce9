"""Attention probabilities of a few query rows from q and k, without computing the full queries x keys map."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class HeadShards:
    """The ranks of a tensor-parallel model, each of which computes some heads of every attention layer."""

    group: Any
    """Their process group."""
    size: int

    def whole(self, own: Tensor, heads: int, dim: int = 1) -> Tensor:
        """All `heads` along `dim`, gathered from every rank's `own`, in rank order, which is head order."""
        if own.shape[dim] == heads:
            return own
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, own.contiguous(), group=self.group)
        return torch.cat(parts, dim)


@dataclass(frozen=True)
class QueryKey:
    """The inputs of one attention computation: q and k after q/k-norm and RoPE, the mask, and v where it is read."""

    query: Float[Tensor, "batch heads queries dim"]
    key: Float[Tensor, "batch kv_heads keys dim"]
    mask: Tensor | None
    """(batch, heads or 1, queries, keys) boolean or additive, (batch, keys) boolean, or `None`."""
    scaling: float
    causal: bool
    softcap: float | None = None
    sliding_window: int | None = None
    """Set only where the kernel itself enforces the window (with a two-dimensional mask or none)."""
    borders: Int[Tensor, "segments+1"] | None = None
    """Where segments of a packed sequence begin and end, if the kernel itself keeps them apart."""
    rotary: Any = None
    """The `position_embeddings` that a decoder layer received for its queries; `None` if it received none."""
    shards: HeadShards | None = None
    """Set where this rank holds only some of the model's `heads` and `kv_heads`."""
    heads: int = 0
    kv_heads: int = 0
    value: Float[Tensor, "batch kv_heads keys dim"] | None = None
    """Values of the keys; `None` where nobody reads them."""

    def whole(self) -> QueryKey:
        """The same with q and k of all heads."""
        if self.shards is None:
            return self
        query, key = self.shards.whole(self.query, self.heads), self.shards.whole(self.key, self.kv_heads)
        value = None if self.value is None else self.shards.whole(self.value, self.kv_heads)
        return replace(self, query=query, key=key, value=value, shards=None)

    def to(self, device: torch.device) -> QueryKey:
        """The same with its tensors moved to `device`, which may not be the one the layer ran on."""
        value = None if self.value is None else self.value.to(device)
        return replace(self, query=self.query.to(device), key=self.key.to(device), value=value)


def row_attention(layer: QueryKey, rows: Int[Tensor, "batch rows"]) -> Float[Tensor, "batch heads rows keys"]:
    """Attention probabilities of the query rows `rows`, equal to the same rows of the eager model's attention map.

    Grouped KV heads are shared without repeating keys. Products and softmax run in float32, so that half precision
    cannot overflow; the result has q's dtype and, in a tensor-parallel model, the heads of all ranks.
    """
    _, heads, _, dim = layer.query.shape
    rows = rows.to(layer.query.device)
    return attend(layer, layer.query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, dim)), rows)


def attend(
    layer: QueryKey, query: Float[Tensor, "batch heads rows dim"], rows: Int[Tensor, "batch rows"]
) -> Float[Tensor, "batch heads rows keys"]:
    """The same as `row_attention` with q of the rows passed separately; only the shape of `layer.query` is read."""
    scores = _scores(layer, query, rows)
    weights = torch.softmax(scores, -1)
    sees_nothing = (scores == -torch.inf).all(-1, keepdim=True)  # as in rows of padding
    weights = weights.masked_fill(sees_nothing, 0.0).to(query.dtype)
    return weights if layer.shards is None else layer.shards.whole(weights, layer.heads)


def last_logits(layer: QueryKey) -> Float[Tensor, "batch heads keys"]:
    """What the softmax of the last query gets: scaled and capped products in float32, with the mask added.

    Keys hidden by a boolean mask get -inf, those hidden by an additive one about the smallest number of its dtype. In a
    tensor-parallel model, the heads of all ranks.
    """
    query = layer.query[:, :, -1:]
    last = torch.full((len(query), 1), layer.query.shape[2] - 1, device=query.device)
    scores = _scores(layer, query, last)[:, :, 0]
    return scores if layer.shards is None else layer.shards.whole(scores, layer.heads)


def _scores(
    layer: QueryKey, query: Float[Tensor, "batch heads rows dim"], rows: Int[Tensor, "batch rows"]
) -> Float[Tensor, "batch heads rows keys"]:
    batch, heads, count, dim = query.shape
    key, rows = layer.key.to(query.device), rows.to(query.device)
    kv_heads = key.shape[1]
    picked = query.reshape(batch, kv_heads, heads // kv_heads * count, dim)  # query heads of one KV head are adjacent
    scores = _wide(picked) @ _wide(key).transpose(-1, -2) * layer.scaling
    scores = scores.view(batch, heads, count, -1)
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    bias = row_bias(layer, rows)
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    return scores


def _wide(values: Tensor) -> Tensor:
    """The values in at least float32, because float16 products overflow before they are scaled."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def row_bias(layer: QueryKey, rows: Int[Tensor, "batch rows"]) -> Tensor | None:
    """The mask for the query rows: (batch, heads or 1, rows, keys), boolean (true: visible) or additive, or `None`."""
    mask = None if layer.mask is None else layer.mask.to(rows.device)
    batch, keys = rows.shape[0], layer.key.shape[2]
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
