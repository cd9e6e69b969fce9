"""The maths of EVS: how much a token differs from the one at its place a frame earlier, and how many tokens stay."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

FIRST = 255.0
"""Score of the tokens of the first frame, above every other: a score is at most 2."""


def change(frames: Float[Tensor, "frames rows dim"]) -> Float[Tensor, "frames rows"]:
    """1 less the cosine of each token and the token at its place in the frame before, in float32.

    Norms are at least 1e-8, so that a zero vector has cosine 0 with all others. Cosines above 1 - 1e-6 count as that,
    so that tokens of equal frames tie exactly, whatever rounding makes of them. In the first frame it is `FIRST`.
    """
    wide = frames.float()
    unit = wide / wide.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    cosine = (unit[1:] * unit[:-1]).sum(-1).clamp(max=1 - 1e-6)
    return torch.cat((torch.full_like(wide[:1, :, 0], FIRST), 1 - cosine))


def retained(frames: int, rows: int, rate: float) -> int:
    """Tokens that stay of so many frames of so many rows at a pruning `rate`: at least those of one frame.

    Computed in doubles in the published order, so that 10 frames of 10 rows at 0.9 give 9.99..., cut to 9.
    """
    return max(rows, int(frames * rows * (1 - rate)))


def most_changed(scores: Float[Tensor, "frames rows"], count: int) -> Bool[Tensor, "frames rows"]:
    """The `count` tokens of a video with the highest scores; ties go to the earlier frame, then to raster order."""
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    keep = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    return keep.index_fill(0, order[:count], True).view(scores.shape)
