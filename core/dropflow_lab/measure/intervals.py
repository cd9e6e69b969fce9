"""Bootstrap intervals of means over questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2000


@dataclass(frozen=True)
class Mean:
    """A mean over questions with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], seed: int = 0) -> Mean:
        """Return the mean of one value per question, or more, and its percentile bootstrap interval.

        Questions are drawn with replacement, 2,000 times (Efron & Tibshirani 1993, section 13.3). For a difference
        between two policies on the same questions, give the differences question by question: the interval is then
        that of the paired difference. Values that are all the same give an interval of no width.
        """
        given = np.asarray(values, dtype=float)
        drawn = np.random.default_rng(seed).integers(len(given), size=(_RESAMPLES, len(given)))
        low, high = np.quantile(given[drawn].mean(1), [0.025, 0.975])
        return cls(float(given.mean()), float(low), float(high))
