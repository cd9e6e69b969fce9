"""The published top-k operator, for comparison with exact selection."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def soft_mask(scores: Float[Tensor, "candidates"], k: int, *, temperature: float = 1.0) -> Float[Tensor, "candidates"]:
    """Soft mask of the operator: sigmoid((rank / N - (1 - k / N)) * N * temperature).

    `rank_i = #{j: c_i >= c_j}`; entries above 0.5 are exactly those that `select: reference` keeps (HiDrop,
    arXiv:2602.23699, section 3.2, after Differentiable Model Scaling). Ranks are counts: scores get no gradient.
    """
    count = scores.shape[-1]
    rank = (scores[:, None] >= scores[None, :]).sum(1)
    return torch.sigmoid((rank - (count - k)).to(scores.dtype) * temperature)
