"""The maths of AutoPrune: shared information, the curve that follows from it, and its fit to a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

EPSILON = 1e-6
"""Keeps the released logarithms finite; it makes the information of even attention slightly negative."""


def information(
    rows: Float[Tensor, "*any texts visual"], received: Float[Tensor, "*any visual"], texts: float | Tensor
) -> Float[Tensor, "*any visual"]:
    """What each visual token adds to the mutual information of text and picture, in bits, as far as `rows` tell.

    `rows` are attention probabilities of text tokens to visual ones, of which there are `texts` in all, and `received`
    their sums over all text tokens. With p = rows / texts and p_y its sums: the sum over `rows` of
    p log2(p / (p_y / texts)), so that the sum over heads, rows and visual tokens is the released quantity.
    """
    share = rows / texts
    even = received[..., None, :] / texts**2
    return (share * (share / (even + EPSILON)).clamp(min=EPSILON).log2()).sum(-2)


@dataclass(frozen=True)
class Curve:
    """The published family of retention curves, b(l) = amplitude / (1 + exp(k (l - (x0 + k)))) after layer l."""

    layers: int
    """Layers, L; the curve has values for 1 to L - 1."""
    x0: float
    """Layer in the middle of the fall."""
    k0: float
    """Slope without any shared information."""
    gamma: float
    """How much a bit of it flattens the slope."""
    amplitude: float

    def slope(self, bits: float) -> float:
        """k: the more information, the flatter."""
        return max(self.k0 - self.gamma * bits, 0.0)

    def shares(self, slope: float) -> list[float]:
        """Share of the tokens after the first cut that is left after each layer from the second on, before any fit."""
        powers = (slope * (layer - (self.x0 + slope)) for layer in range(1, self.layers))
        return [self.amplitude / (1 + math.exp(min(power, 700.0))) for power in powers]


@dataclass(frozen=True)
class Recycling:
    """How many of the tokens that go live on as clusters."""

    share: float = 0.3
    """Share of the dropped tokens that is clustered."""
    size: int = 10
    """Tokens for every cluster, about."""

    def of(self, dropped: int) -> tuple[int, int]:
        """Of `dropped` tokens, how many are clustered, and into how many clusters."""
        if dropped <= 0:
            return 0, 0
        count = min(int(self.share * dropped) + 1, dropped)
        return count, min(count // self.size + 1, count)


def survivors(first: int, share: float) -> int:
    """Tokens that a share of the `first` ones leaves, as released: one less than there are, rounded up."""
    return math.ceil((first - 1) * min(1.0, share))


def total(first: int, shares: Sequence[float], recycling: Recycling) -> int:
    """Tokens after all layers together, when shares of the `first` ones stay, and clusters of the others."""
    left = found = first
    for share in shares:
        kept = survivors(first, share)
        left = kept + recycling.of(left - kept)[1]
        found += left
    return found


def fitted(first: int, shares: Sequence[float], target: float, recycling: Recycling, *, capped: bool = False) -> float:
    """The factor on the shares with which the tokens after all L layers come nearest to L * `target`.

    1 where the plain shares meet it. Otherwise by bisection from 0 to 20, of which the nearest step counts; where a
    factor of 20 leaves too few tokens, up to the one with which every share is 1. The released code stops at 20, as
    with `capped`.
    """

    def at(factor: float) -> int:
        return total(first, [factor * share for share in shares], recycling)

    wanted = target * (len(shares) + 1)
    plain = sum(int(first * share) for share in shares) + int(first * shares[-1])
    if abs(plain - wanted) < 1:
        return 1.0
    low, high = 0.0, 20.0
    while high * min(shares) < 1 and not capped and at(high) < wanted:
        high *= 2
    best, nearest = high, math.inf
    for _ in range(200):
        middle = (low + high) / 2
        found = at(middle)
        if abs(found - wanted) < nearest:
            best, nearest = middle, abs(found - wanted)
        if nearest < 0.01:
            break
        low, high = (middle, high) if found < wanted else (low, middle)
    return best
