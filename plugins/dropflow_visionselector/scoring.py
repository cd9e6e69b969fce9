"""The scorer of VisionSelector, its relaxed choice of k rows, and what holds that choice near a hard one."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy

from dropflow.operators import soft_counted

_DEVIATION = 1e-4


class Scorer(nn.Module):
    """Scores the projected rows of an image by one attention head without a softmax.

    The score of a row is the mean over all rows j of q_i . k_j / sqrt(h), h = dim / 2, and therefore q_i . k(mean row)
    / sqrt(h), since k is affine: no map of rows is computed. Starts with weights of a normal distribution of deviation
    1e-4 and biases of 0, so that all scores are near 0.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(dim, dim // 2), nn.Linear(dim, dim // 2)
        for projection in (self.q_proj, self.k_proj):
            nn.init.normal_(projection.weight, std=_DEVIATION)
            nn.init.zeros_(projection.bias)

    def forward(self, rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows"]:
        """Scores in float32, on the device of `rows`."""
        weight = self.q_proj.weight
        own = rows.to(weight)
        query, key = self.q_proj(own).float(), self.k_proj(own.float().mean(0).to(weight)).float()
        scores: Tensor = query @ key / weight.shape[0] ** 0.5
        return scores.to(rows.device)


def soft_mask(
    scores: Float[Tensor, "rows"], group: Int[Tensor, "rows"], counts: Float[Tensor, "groups"]
) -> Float[Tensor, "rows"]:
    """m_i = sigmoid(s_i + t) of each group, with t such that it sums to the group's count; in float32.

    t is found by bisection and differentiated exactly: ds_i = g_i v_i - v_i (sum g v) / (sum v), v = m (1 - m).
    """
    return soft_counted(scores.float()[None], group[None], counts, temperature=1.0)[0]


def constraint(soft: Float[Tensor, "rows"], hard: Bool[Tensor, "rows"]) -> Float[Tensor, ""]:
    """Mean binary cross-entropy of a soft mask against the hard choice, logarithms not below -100; in float32."""
    with torch.autocast(soft.device.type, enabled=False):  # which refuses this loss
        loss: Tensor = binary_cross_entropy(soft.float(), hard.float())
    return loss
