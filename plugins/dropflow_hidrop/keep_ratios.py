"""The trained schedule of the concave pyramid: what it costs, and the plain counts that come out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

N = TypeVar("N", float, Tensor)
FURTHEST = 0.98
"""Largest keep ratio to start from; a ratio of 1 would have no gradient."""


class KeepRatios(nn.Module):
    """The share of an image's tokens that stays after each boundary, as a product of ratios in (0, 1).

    Each ratio is the sigmoid of a parameter, so that no schedule grows. Computed in float32.
    """

    def __init__(self, shares: Sequence[float], hidden: int, intermediate: int) -> None:
        """`shares` of an image's tokens, by boundary, are the start; `hidden` and `intermediate` the LLM's widths."""
        super().__init__()
        ratios = [after / before for before, after in pairwise((1.0, *shares))]
        self.logits = nn.Parameter(torch.logit(torch.tensor(ratios).clamp(1 - FURTHEST, FURTHEST)))
        self.hidden, self.intermediate = hidden, intermediate

    def shares(self) -> Float[Tensor, "boundaries"]:
        """The shares that stay, descending."""
        return torch.sigmoid(self.logits.float()).cumprod(0)


def annealed(start: float, end: float, progress: float) -> float:
    """The temperature after a part of training: from `start` to `end`, by equal factors in equal times."""
    return start * math.exp(math.log(end / start) * progress)


def average_tokens(counts: Sequence[N], spans: Sequence[int], layers: int) -> N:
    """Visual tokens per layer, averaged over all layers; `counts[i]` are live in `spans[i]` of them."""
    total = counts[0] * spans[0]
    for count, span in zip(counts[1:], spans[1:], strict=True):
        total = total + count * span
    return total / layers


def share_of_work(counts: Sequence[N], spans: Sequence[int], layers: int, whole: float, ratios: KeepRatios) -> N:
    """Multiply-adds on visual tokens, as a share of those of `layers` layers with `whole` tokens each.

    By 4 n d^2 + 2 n^2 d + 3 n d m per layer (HiDrop, arXiv:2602.23699, section 4.2), text left out.
    """
    d, m = ratios.hidden, ratios.intermediate
    linear, square = 4.0 * d * d + 3.0 * d * m, 2.0 * d
    dense = whole * linear + whole * whole * square
    return average_tokens([(n * linear + n * n * square) * (1 / dense) for n in counts], spans, layers)


def fitted_counts(
    shares: Mapping[int, float], tokens: int, cost: Callable[[Sequence[int]], float], target: float
) -> dict[int, int]:
    """Whole counts, by boundary, in proportion to `shares` of `tokens`, at most as expensive as `target`.

    All shares are scaled by one factor, rounded down, and what the budget then leaves goes to the counts that lost most
    by it. At least one token stays. Where even a token each costs more than `target`, it is one token each.
    """

    def at(factor: float) -> list[float]:
        return [min(max(1.0, factor * share * tokens), float(tokens)) for share in shares.values()]

    low, high = 0.0, 1 / min(shares.values())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost([int(exact) for exact in at(middle)]) <= target else (low, middle)
    exact = at(low)
    counts = [int(each) for each in exact]
    for place in sorted(range(len(counts)), key=lambda place: counts[place] - exact[place]):
        more = [count + (place == other) for other, count in enumerate(counts)]
        descends = all(before >= after for before, after in pairwise((tokens, *more)))
        if descends and cost(more) <= target + 1e-9:
            counts = more
    return dict(zip(shares, counts, strict=True))
