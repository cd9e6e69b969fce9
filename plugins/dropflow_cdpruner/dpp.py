"""The maths of a conditional determinantal point process: relevance, its kernel, and the greedy MAP choice."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

OFFSET = 1e-6
"""Added to the numerator when relevance is rescaled, so that the least relevant token stays possible."""
FLOOR = 1e-6
"""Share of the first residual below which further ones are rounding errors."""


def mean_cosine(rows: Float[Tensor, "tokens dim"], text: Float[Tensor, "texts dim"]) -> Float[Tensor, "tokens"]:
    """Cosine of each row with each text vector, mean over texts, in float32."""
    return normalize(rows.float(), dim=1) @ normalize(text.float(), dim=1).mean(0)


def rescaled(
    similarity: Float[Tensor, "tokens"], low: Float[Tensor, ""] | None = None, high: Float[Tensor, ""] | None = None
) -> Float[Tensor, "tokens"]:
    """Relevance in 1e-6 to 1 (plus that offset over the range): 0 at `low`, 1 at `high`, by default those of its own.

    1 everywhere where the two are equal, so that nothing but diversity decides.
    """
    low = similarity.min() if low is None else low
    high = similarity.max() if high is None else high
    spread = high - low
    return torch.where(spread > 0, (similarity - low + OFFSET) / torch.where(spread > 0, spread, 1), 1.0)


def sharpened(relevance: Float[Tensor, "tokens"], theta: float) -> Float[Tensor, "tokens"]:
    """exp(alpha r), alpha = theta / (2 (1 - theta)): theta in (0, 1) is the weight of relevance beside diversity."""
    return (theta / (2 * (1 - theta)) * relevance).exp()


def greedy_map(
    features: Float[Tensor, "tokens dim"], relevance: Float[Tensor, "tokens"], count: int
) -> Int[Tensor, "count"]:
    """Choose `count` tokens, in the order of choice, that together make det(L_Y) large.

    L = diag(r) S diag(r), with S the cosines of the features. Each choice is the token whose residual, the factor by
    which it multiplies the determinant, is largest; so a choice of k tokens starts with the choice of k - 1. Ties go
    to the lowest index. Residuals come from an incremental Cholesky factor (Chen et al., 2018), and rows of L are made
    as they are needed, never the whole kernel. Once the tokens left add nothing (residuals below 1e-6 of the first,
    as where more are asked for than are independent), the most relevant of them follow.
    """
    unit, count = normalize(features.float(), dim=1), min(count, len(features))
    relevance = relevance.float()
    residual = relevance.square() * unit.square().sum(1)
    factor = residual.new_zeros(count, len(residual))
    chosen = torch.zeros(count, dtype=torch.long, device=features.device)
    gains = residual.new_zeros(count)
    for step in range(count):
        best = residual.argmax()
        chosen[step], gains[step] = best, residual[best]
        done = factor[:step]
        row = relevance[best] * relevance * (unit @ unit[best]) - done[:, best] @ done
        factor[step] = row / residual[best].clamp(min=torch.finfo(row.dtype).tiny).sqrt()
        residual = (residual - factor[step].square()).index_fill(0, best, -torch.inf)
    sound = int((gains > FLOOR * gains[:1]).cumprod(0).sum())
    rest = relevance.index_fill(0, chosen[:sound], -torch.inf)
    return torch.cat((chosen[:sound], torch.sort(rest, descending=True, stable=True).indices[: count - sound]))
