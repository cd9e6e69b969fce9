"""Pure functions that cluster tokens by density peaks."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def density_peaks(
    states: Float[Tensor, "tokens dim"], count: int, neighbours: int, noise: Float[Tensor, "tokens"] | None = None
) -> tuple[Int[Tensor, "clusters"], Int[Tensor, "tokens"]]:
    """The tokens that are centres of `count` clusters (at most all), best first, and the cluster of every token.

    Distances are Euclidean, over sqrt(dim), in float32. Density: exp(-mean squared distance to the `neighbours` nearest
    tokens, itself included), plus `noise`. Centres are those with the largest density times distance to the nearest
    token of higher density; for the densest, the largest distance of all. Every other token joins its nearest centre,
    ties to the better one. Equal densities count as falling in token order (DPC-kNN).
    """
    states = states.float()
    distance = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist") / states.shape[1] ** 0.5
    nearest = distance.topk(min(neighbours, len(states)), largest=False).values
    density = torch.exp(-(nearest**2).mean(-1))
    if noise is not None:
        density = density + noise
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
