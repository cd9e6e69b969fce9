"""Intervals of shares and of paired gains against published values; none of them collapses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dropflow_lab.measure.intervals import Gain, Share, wilson


def pairs(both: int, own: int, other: int, neither: int) -> tuple[list[float], list[float]]:
    """Answers to the same questions: right by both, by the first alone, by the second alone, by none."""
    first = [1.0] * (both + own) + [0.0] * (other + neither)
    return first, [1.0] * both + [0.0] * own + [1.0] * other + [0.0] * neither


def test_wilson_intervals_of_known_values() -> None:
    assert wilson(0.96, 1000) == pytest.approx((0.94600, 0.97048), abs=1e-5)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson(1.0, 20) == pytest.approx((0.83887, 1.0), abs=1e-5)
    assert wilson(0.0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("table", "interval"),
    [
        ((36, 12, 2, 0), (0.0569, 0.3404)),  # Newcombe 1998, table II, method 10
        ((1, 1, 7, 12), (-0.5069, -0.0256)),  # Fagerland, Lydersen and Laake 2014, airway hyper-responsiveness
        ((20, 0, 0, 0), (-0.1611, 0.1611)),  # all right on both sides
    ],
)
def test_paired_gains_of_known_values(table: tuple[int, int, int, int], interval: tuple[float, float]) -> None:
    gain = Gain.of(*pairs(*table))
    assert gain.value == pytest.approx((table[1] - table[2]) / sum(table))
    assert (gain.low, gain.high) == pytest.approx(interval, abs=1e-4)


def test_a_paired_difference_is_narrower_than_two_independent_shares() -> None:
    own, other = pairs(780, 20, 0, 200)
    paired = Gain.of(own, other)
    assert paired.value == pytest.approx(0.02)
    assert paired.low > 0.01 > Share.of(own).low - Share.of(other).high


def test_the_verdict_follows_from_the_interval() -> None:
    verdicts = [Gain.of(*pairs(50, own, other, 50)).verdict for own, other in ((40, 5), (5, 40), (5, 5))]
    assert verdicts == ["above", "below", "level"]


Values = st.lists(st.tuples(*[st.sampled_from([0.0, 1 / 3, 2 / 3, 1.0])] * 2), min_size=1, max_size=30)


@given(Values)
def test_every_interval_has_a_width_and_holds_its_value(values: list[tuple[float, float]]) -> None:
    own, other = ([value[side] for value in values] for side in (0, 1))
    share, gain = Share.of(own), Gain.of(own, other)
    assert 0 <= share.low <= share.value <= share.high <= 1
    assert -1 <= gain.low <= gain.value + 1e-9
    assert gain.value - 1e-9 <= gain.high <= 1
    assert share.high - share.low > 0.05
    assert gain.high - gain.low > 0.01
