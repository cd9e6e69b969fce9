"""Bootstrap intervals against closed forms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dropflow_lab.measure.intervals import Mean


def test_the_interval_of_a_share_is_near_the_normal_one() -> None:
    values = [1.0] * 700 + [0.0] * 300
    mean = Mean.of(values)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 1000)
    assert mean.value == pytest.approx(0.7)
    assert (mean.low, mean.high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.004)


def test_a_paired_difference_is_narrower_than_two_independent_shares() -> None:
    first, second = [1.0] * 800 + [0.0] * 200, [1.0] * 780 + [0.0] * 220
    paired = Mean.of([a - b for a, b in zip(first, second, strict=True)])
    assert paired.value == pytest.approx(0.02)
    assert paired.low > 0.01 > Mean.of(first).low - Mean.of(second).high


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 5))
def test_a_mean_lies_in_its_interval_and_the_interval_in_the_range(values: list[float], seed: int) -> None:
    mean = Mean.of(values, seed)
    slack = 1e-9
    assert min(values) - slack <= mean.low <= mean.high <= max(values) + slack
    assert mean == Mean.of(values, seed)
    if len(set(values)) == 1:
        assert (mean.low, mean.high) == pytest.approx((mean.value, mean.value))
