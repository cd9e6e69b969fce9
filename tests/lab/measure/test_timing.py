"""Interleaving and spreads."""

from __future__ import annotations

import gc

import pytest

from dropflow_lab.measure.timing import Spread, interleaved, ratio


def test_runs_take_turns_and_every_other_round_goes_backwards() -> None:
    order: list[str] = []
    samples = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3, repeats={"b": 2})
    assert "".join(order) == "bba" + "abb" + "bba" + "abb"  # the first round warms up
    assert {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3}
    assert all(seconds >= 0 for times in samples.values() for seconds in times)


def test_garbage_collection_is_off_during_samples_and_back_afterwards() -> None:
    seen: list[bool] = []
    interleaved({"a": lambda: seen.append(gc.isenabled())}, rounds=2)
    assert seen == [False] * 3
    assert gc.isenabled()


def test_what_was_frozen_before_stays_frozen() -> None:
    before = gc.get_freeze_count()
    assert before > 100_000  # by `conftest.py`
    during: list[int] = []
    interleaved({"a": lambda: during.append(gc.get_freeze_count())}, rounds=1)
    assert all(count > 0.9 * before for count in during)
    assert gc.get_freeze_count() > 0.9 * before
    gc.unfreeze()
    try:
        interleaved({"a": lambda: during.append(gc.get_freeze_count())}, rounds=1)
        assert during[-1] > 100_000
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()


def test_ratios_pair_the_samples_of_a_round() -> None:
    assert ratio([2.0, 6.0, 12.0], [1.0, 2.0, 3.0]) == Spread(median=3.0, low=2.5, high=3.5)


def test_a_spread_over_a_number() -> None:
    assert Spread(4.0, 2.0, 5.0).over(2) == Spread(2.0, 1.0, 2.5)


def test_a_failing_run_leaves_garbage_collection_on() -> None:
    with pytest.raises(ZeroDivisionError):
        interleaved({"a": lambda: 1 / 0}, rounds=1)
    assert gc.isenabled()
