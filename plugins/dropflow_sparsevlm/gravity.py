"""Gravity correction (SparseVLM+): attention without what RoPE alone gives to near tokens, and the heads that see best.

RoPE makes attention fall with distance, whatever a token shows. All-ones vectors tell by how much: rotated as q and k
are, their product is W = (2 / sqrt(d)) * sum_i cos((p_q - p_k) * theta_i), and attention is divided by it.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow import PruneCall
from dropflow.operators import row_parts

LEAST = 0.05
"""W is taken as no less than this share of sqrt(d), its value at distance 0."""


def gravity(
    cos: Float[Tensor, "batch slots dims"],
    sin: Float[Tensor, "batch slots dims"],
    rows: Int[Tensor, "batch rows"],
    head_dim: int,
) -> Float[Tensor, "batch rows slots"]:
    """W between query rows and all slots, in float32: an all-ones q by an all-ones k, over sqrt(d).

    With (x, y) -> (x cos - y sin, y cos + x sin), a pair of ones at angles a and b gives 2 cos(a - b). Every angle
    stands twice in `cos` and `sin`, once for each number of a pair; the other d - dims numbers of a head are not
    rotated.
    """
    cos, sin = cos.float(), sin.float()
    picked = rows[:, :, None].expand(-1, -1, cos.shape[2])
    turned = cos.gather(1, picked) @ cos.mT + sin.gather(1, picked) @ sin.mT
    return (turned + (head_dim - cos.shape[2])) * math.pow(head_dim, -0.5)


def guarded(pull: Float[Tensor, "batch rows slots"], head_dim: int) -> Float[Tensor, "batch rows slots"]:
    """W that may be divided by: never below `LEAST * sqrt(d)`, since it oscillates around 0 at long distances."""
    return pull.clamp(min=LEAST * head_dim**0.5)


def corrected_attention(
    call: PruneCall, rows: Int[Tensor, "batch raters"], asks: Bool[Tensor, "batch raters"], *, guard: bool
) -> Float[Tensor, "batch heads slots"]:
    """Sum over the raters of their attention, in the layer before the boundary, divided by W.

    `guard` keeps W from 0 (see `guarded`).
    """
    layer = call.boundary - 1
    head_dim = call.tapped(layer).query.shape[-1]
    pull = gravity(*call.rotary(layer), rows, head_dim)
    if guard:
        pull = guarded(pull, head_dim)
    total, start = torch.zeros((), device=pull.device), 0
    for part in row_parts(call, layer, rows, asks):
        own = pull[:, None, start : start + part.shape[2]]
        total, start = total + (part / own).sum(2), start + part.shape[2]
    return total


def best_heads(
    attention: Float[Tensor, "batch heads slots"], visual: Bool[Tensor, "batch slots"], share: float
) -> Float[Tensor, "batch slots"]:
    """Mean over the `share` of each sample's heads (at least one) with the most attention to visual tokens.

    Ties go to the first head, halves of heads are rounded up.
    """
    heads = attention.shape[1]
    count = max(1, int(share * heads + 0.5))
    most = (attention * visual[:, None]).sum(2).sort(dim=1, descending=True, stable=True).indices[:, :count]
    return attention.gather(1, most[:, :, None].expand(-1, -1, attention.shape[2])).mean(1)
