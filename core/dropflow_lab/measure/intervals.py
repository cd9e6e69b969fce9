"""95 % intervals of shares of questions, and of the difference between two shares of the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

_Z = 1.959964  # the 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Share:
    """A share of questions with its 95 % interval, which is wider than 0 even if all answers are right."""

    value: float
    low: float
    high: float
    asked: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Share:
        """Return the mean of one value per question, each from 0 to 1, with its Wilson interval.

        A value between 0 and 1 is itself a mean, over seeds; the interval is then that of the questions, as wide as if
        each had been asked once.
        """
        value = fmean(values)
        return cls(value, *wilson(value, len(values)), len(values))


@dataclass(frozen=True)
class Gain:
    """Difference between two shares of the same questions, with its paired 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, own: Sequence[float], other: Sequence[float]) -> Gain:
        """Return the mean of `own` less that of `other`, question by question, each value from 0 to 1.

        The interval is Newcombe's square-and-add for paired proportions: the Wilson bounds of both shares, combined by
        their correlation, with his continuity correction (Statistics in Medicine 17, 1998, pages 2635-2650, method 10).
        Where values are means over seeds, the correlation is at most what it would be for right and wrong answers.
        """
        first, second, asked = fmean(own), fmean(other), len(own)
        (low, high), (other_low, other_high) = wilson(first, asked), wilson(second, asked)
        correlation = _correlation(own, other, first, second)

        def joined(one: float, two: float) -> float:
            return math.sqrt(max(0.0, one * one - 2 * correlation * one * two + two * two))

        value = first - second
        below, above = joined(first - low, other_high - second), joined(high - first, second - other_low)
        return cls(value, max(-1.0, value - below), min(1.0, value + above))

    @property
    def verdict(self) -> str:
        """`above` or `below` if the interval excludes 0, else `level`."""
        return "above" if self.low > 0 else "below" if self.high < 0 else "level"


def wilson(share: float, asked: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share (Wilson, JASA 22, 1927); (0, 1) if nothing was asked."""
    if not asked:
        return 0.0, 1.0
    square = _Z * _Z / asked
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def _correlation(own: Sequence[float], other: Sequence[float], first: float, second: float) -> float:
    spread = math.sqrt(first * (1 - first) * second * (1 - second))
    if not spread:
        return 0.0
    shared = fmean(a * b for a, b in zip(own, other, strict=True)) - first * second
    if shared > 0:
        shared = max(0.0, shared - 0.5 / len(own))
    return shared / spread
