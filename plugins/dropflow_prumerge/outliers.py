"""The maths of PruMerge: how many patches stand out, which ones stay, and what is merged into them (section 3)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def outliers(scores: Float[Tensor, "values"], factor: float) -> Int[Tensor, ""]:
    """Number of values above the third quartile by more than `factor` times the distance of the quartiles."""
    low, high = (torch.quantile(scores.float(), quarter) for quarter in (0.25, 0.75))
    return (scores.float() > high + factor * (high - low)).sum()


def grid_step(patches: int, kept: int) -> int:
    """Distance of the patches that PruMerge+ samples, if `kept` of `patches` stand out: a third of their ratio."""
    return max(patches // kept // 3, 1)


def with_grid(kept: Int[Tensor, "kept"], patches: int, *, first: int, step: int) -> Int[Tensor, "sampled"]:
    """`kept`, followed by every `step`-th patch from `first` on that is not among them; the last patch is no sample."""
    grid = torch.arange(first, max(patches - 1, first), step, device=kept.device)
    return torch.cat((kept, grid[~torch.isin(grid, kept)]))


def merge_neighbours(
    features: Float[Tensor, "patches dim"],
    keys: Float[Tensor, "patches width"],
    scores: Float[Tensor, "patches"],
    kept: Int[Tensor, "kept"],
    neighbours: int,
) -> Float[Tensor, "kept dim"]:
    """Each kept patch plus the sum of its nearest other patches, kept ones among them, weighted by their scores.

    Near is a large cosine of the keys. The weights are the scores themselves, not normalised, as released.
    """
    unit, count = torch.nn.functional.normalize(keys.float(), dim=1), min(neighbours, len(features) - 1)
    merged = []
    for some in torch.split(kept, max(1, len(features) // 8)):  # so that no map of all patches is formed
        with torch.no_grad():
            cosines = (unit[some] @ unit.T).scatter(1, some[:, None], -torch.inf)
            nearest = cosines.topk(count).indices
            weights = torch.zeros_like(cosines).scatter(1, nearest, scores.float()[nearest])
        merged.append(features[some] + weights.to(features.dtype) @ features)
    return torch.cat(merged) if merged else features[:0]


def left_over(
    features: Float[Tensor, "patches dim"], scores: Float[Tensor, "patches"], kept: Int[Tensor, "kept"]
) -> Float[Tensor, "extra dim"]:
    """One row, the sum of all patches that are not kept, weighted by their scores; no row if all are kept."""
    weights = scores.to(features.dtype).index_fill(0, kept, 0)
    return (weights @ features)[None][: int(len(kept) < len(features))]


def reduced(
    features: Float[Tensor, "patches dim"],
    keys: Float[Tensor, "patches width"],
    scores: Float[Tensor, "patches"],
    kept: Int[Tensor, "kept"],
    neighbours: int,
) -> Float[Tensor, "rows dim"]:
    """Kept patches with their neighbours merged in, then the sum of those left over."""
    merged = merge_neighbours(features, keys, scores, kept, neighbours)
    return torch.cat((merged, left_over(features, scores, kept)))
