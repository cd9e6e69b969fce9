"""Recycling: the best of the dropped tokens are clustered, and every cluster stays as one token (SparseVLM)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from dropflow import operators

NOISE = 1e-6
"""Largest amount by which the released code disturbs densities to separate ties."""


def clusters(
    states: Float[Tensor, "tokens dim"], count: int, noise: Float[Tensor, "tokens"] | None = None
) -> tuple[Int[Tensor, "clusters"], Int[Tensor, "tokens"]]:
    """Density peaks with `count` neighbours: the centres of `count` clusters, best first, and the cluster of every
    token.

    Equal densities count as falling in token order; the released code disturbs them by `noise` in [0, 1) times 1e-6
    instead.
    """
    return operators.density_peaks(states, count, count, None if noise is None else NOISE * noise)
