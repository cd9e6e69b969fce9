"""Pure functions that choose tokens: top-k, per image or for all, with a stated rule for ties."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def top(scores: Float[Tensor, "tokens"], count: int) -> Int[Tensor, "count"]:
    """The `count` highest-scored tokens, best first, ties to the lowest index; all of them if there are fewer.

    NaN counts as the lowest of all.
    """
    return torch.sort(_nan_last(scores), descending=True, stable=True).indices[:count]


def keep_top(
    scores: Float[Tensor, "batch slots"],
    image: Int[Tensor, "batch slots"],
    counts: Sequence[int] | Int[Tensor, "images"],
    *,
    keep_ties: bool = False,
) -> Bool[Tensor, "batch slots"]:
    """Keep the `counts[g]` highest-scored tokens of every image g, separately in each sample.

    Counts given as a tensor on the device (see `PruneCall.counts`) cost no copy from the host. NaN counts as the lowest
    of all scores. `image` holds image numbers, -1 for tokens that belong to none (never kept here). Ties at the cut
    go to the lowest slot, so that exactly min(count, size) tokens stay; with `keep_ties` the whole tie group stays, as
    in rank operators such as DMS (rank_i > N - k with rank_i = #{j: c_i >= c_j}), so that more tokens may stay.
    """
    batch, slots = scores.shape
    images = len(counts)
    scores = _nan_last(scores)
    group = torch.where(image < 0, images, image)  # text is in a last group that keeps nothing
    group = (group + torch.arange(batch, device=group.device)[:, None] * (images + 1)).flatten()
    by_score = torch.sort(scores.flatten(), descending=True, stable=True).indices
    order = by_score[torch.sort(group[by_score], stable=True).indices]  # grouped, best first inside a group
    sizes = torch.zeros(batch * (images + 1), dtype=torch.long, device=group.device)
    sizes.index_add_(0, group, torch.ones_like(group))  # `bincount` would wait for the device
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(batch * slots, device=order.device) - starts[group[order]]
    allowed = torch.as_tensor(counts, dtype=torch.long, device=scores.device)
    allowed = torch.nn.functional.pad(allowed, (0, 1)).repeat(batch)[group]
    keep = rank < allowed
    if keep_ties:
        lowest = scores.new_full((batch * (images + 1),), torch.inf)
        kept = torch.where(keep, scores.flatten(), torch.inf)
        lowest = lowest.scatter_reduce(0, group, kept, "amin")
        keep = (scores.flatten() >= lowest[group]) & (allowed > 0)
    return keep.view(batch, slots)


def _nan_last(scores: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Scores with NaN replaced by the lowest value, since it would sort as the highest."""
    return torch.where(scores.isnan(), -torch.inf, scores) if scores.is_floating_point() else scores
