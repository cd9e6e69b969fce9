"""Pure functions that find clusters of tokens by density peaks."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

NOISE = 1e-6
"""Largest amount by which released codes of methods disturb densities to separate ties."""


def clusters(
    states: Float[Tensor, "tokens dim"], count: int, noise: Float[Tensor, "tokens"] | None = None
) -> tuple[Int[Tensor, "clusters"], Int[Tensor, "tokens"]]:
    """Density peaks: the tokens that are centres of `count` clusters, best first, and the cluster of every token.

    Distances are Euclidean, over sqrt(dim). Density: exp(-mean squared distance to the `count` nearest tokens, itself
    included). Centres are those with the largest density times distance to the nearest token of higher density; for
    the densest, the largest distance of all. Every other token joins its nearest centre, ties to the first. Equal
    densities count as falling in token order; with `noise` in [0, 1), 1e-6 times as much disturbs them instead,
    as in the released codes of methods that recycle tokens.
    """
    states = states.float()
    distance = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist") / states.shape[1] ** 0.5
    nearest = distance.topk(count, largest=False).values
    density = torch.exp(-(nearest**2).mean(-1))
    if noise is not None:
        density = density + NOISE * noise
    order = torch.sort(density, descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    higher = rank[None, :] < rank[:, None]
    apart = torch.where(higher, distance, torch.inf).amin(-1)
    apart = torch.where(higher.any(-1), apart, distance.max())
    centres = torch.sort(apart * density, descending=True, stable=True).indices[:count]
    cluster = distance[:, centres].argmin(1)
    cluster[centres] = torch.arange(len(centres), device=centres.device)
    return centres, cluster
