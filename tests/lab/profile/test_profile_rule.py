"""The rule, on curves whose answer can be read off."""

from __future__ import annotations

import pytest

from dropflow.lifecycle.stage import Window
from dropflow_lab.errors import InputError
from dropflow_lab.profile.rule import (
    Knobs,
    average_of,
    choose,
    choose_entry,
    choose_exit,
    choose_keeps,
    choose_prunes,
    latest_first_prune,
)

HIDROP = Window(8, 24)
"""HiDrop's window on LLaVA-1.5-7B, with prunings at 10, 14, 16 and 18."""


@pytest.mark.parametrize(
    ("scores", "loss", "expected"),
    [
        ([0.1, 0.5, 0.88, 0.9], 0.02, 2),
        ([0.1, 0.5, 0.87, 0.9], 0.02, 3),
        ([0.1, 0.9, 0.5, 0.9], 0.02, 3),  # a good exit before a bad one is luck
        ([0.1, 0.5, 0.6, 0.8], 0.02, 4),  # not even the last layer is free
        ([0.9, 0.9, 0.9, 0.9], 0.0, 0),
    ],
)
def test_the_first_exit_from_which_all_cost_little(scores, loss, expected) -> None:
    assert choose_exit(0.9, scores, loss) == expected


@pytest.mark.parametrize(
    ("visual", "exit_at", "expected"),
    [
        ([0.9, 0.8, 0.9, 0.95, 0.9, 0.95, 0.9], 8, 1),
        ([0.9, 0.8, 0.9, 0.7, 0.9, 0.5, 0.9], 8, 3),  # the lowest in the first half, not the first, not the deepest
        ([0.9, 0.8, 0.9, 0.7, 0.9, 0.5, 0.9], 3, 1),  # before the exit
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], 8, 0),  # no minimum
        ([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], 8, 0),  # an end is no minimum
        ([0.9, 0.8, 0.8, 0.9, 0.9, 0.9, 0.9], 8, 1),  # the first of a plateau
    ],
)
def test_vision_enters_at_the_lowest_early_minimum(visual, exit_at, expected) -> None:
    assert choose_entry(visual, exit_at) == expected


@pytest.mark.parametrize(
    ("ilvas", "most", "latest_first", "expected"),
    [
        ([0.1, 0.2, 0.5, 0.3, 0.6, 0.3, 0.4, 0.1, 0.2], 4, 3, [2, 4, 6]),
        ([0.1, 0.2, 0.5, 0.3, 0.6, 0.3, 0.4, 0.1, 0.2], 2, 3, [2, 4]),  # the highest two
        ([0.1, 0.2, 0.3, 0.4, 0.6, 0.3, 0.7, 0.1, 0.2], 4, 3, [2, 4, 6]),  # 2 is added; 3 lies beside a maximum
        ([0.1, 0.2, 0.3, 0.4, 0.6, 0.3, 0.7, 0.1, 0.2], 2, 3, [2, 6]),  # and the lower maximum gives way
        ([0.1, 0.2, 0.3, 0.4, 0.6, 0.3, 0.7, 0.1, 0.2], 1, 3, [3]),  # the early boundary of the highest value
        ([0.1, 0.2, 0.3, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1], 4, 2, [2]),  # a maximum beside the only early one goes
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], 4, 3, [2]),  # no maximum at all
    ],
)
def test_pruning_stands_at_the_highest_maxima_of_ilvas(ilvas, most, latest_first, expected) -> None:
    assert choose_prunes(ilvas, Window(1, 8), most, latest_first) == expected


def test_a_window_of_one_layer_has_nowhere_to_prune() -> None:
    assert choose_prunes([0.1, 0.2, 0.1, 0.2], Window(2, 3), 4, 3) == []


def test_keeps_shrink_by_one_factor_and_meet_the_average() -> None:
    """HiDrop published 87, 10, 5, 1 for 48 tokens at these boundaries, with the tail set by hand."""
    keeps = choose_keeps(48, 32, 576, HIDROP, [10, 14, 16, 18])
    assert keeps == {10: 87, 14: 13, 16: 2, 18: 1}
    assert 0 <= average_of(32, 576, HIDROP, keeps) - 48 < 4 / 32


@pytest.mark.parametrize("average", [40, 64, 80, 150, 287])
def test_any_average_that_can_be_reached_is_met(average) -> None:
    keeps = choose_keeps(average, 32, 576, HIDROP, [10, 14, 16, 18])
    counts = list(keeps.values())
    assert counts == sorted(counts, reverse=True)
    assert 1 <= counts[-1] <= counts[0] <= 576
    assert 0 <= average_of(32, 576, HIDROP, keeps) - average < 4 / 32  # the first keep spans four layers


def test_no_keeps_where_the_window_alone_is_enough() -> None:
    assert choose_keeps(288, 32, 576, HIDROP, [10, 14]) == {}


def test_the_budget_is_not_spent_in_front_of_the_first_pruning() -> None:
    assert latest_first_prune(48, 32, 576, 8) == 10  # HiDrop's, at its smallest setting
    assert latest_first_prune(36, 12, 144, 1) == 3
    assert latest_first_prune(1, 12, 144, 1) == 2  # one layer has to see the picture


VISUAL = [0.95, 0.93, 0.98, 0.97, 0.98, 0.98, 0.99]
ILVAS = [0.3, 0.4, 0.5, 0.4, 0.6, 0.4, 0.3]
EXITS = [0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.95, 0.96]


def test_the_whole_rule() -> None:
    choice = choose(VISUAL, ILVAS, 0.96, EXITS, 100, Knobs(fewer=0.75))
    assert (choice.entry, choice.exit, list(choice.keep)) == (1, 6, [2, 4])
    assert choice.average_visual_tokens == pytest.approx(25, abs=2 / 8)


def test_given_boundaries_stand() -> None:
    choice = choose(VISUAL, ILVAS, 0.96, EXITS, 100, Knobs(average_tokens=30, entry=3, exit=8))
    assert (choice.entry, choice.exit, list(choice.keep)) == (3, 8, [4])
    assert choice.average_visual_tokens == pytest.approx(30, abs=4 / 8)


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        (Knobs(average_tokens=2), r"average of 2 tokens cannot be met with vision in layers 1 to 5: .* 13\.00 to"),
        (Knobs(entry=6), "enter at boundary 6 and be gone from 6 on"),
        (Knobs(entry=5, average_tokens=5), r"no boundary after 5 and before 6 .* another --average-tokens"),
    ],
)
def test_a_budget_that_cannot_be_met(knobs, expected) -> None:
    with pytest.raises(InputError, match=expected):
        choose(VISUAL, ILVAS, 0.96, EXITS, 100, knobs)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_that_saves_nothing_or_all(share: float) -> None:
    with pytest.raises(InputError, match=f"--fewer: expected a share above 0 and below 1, got {share:g}"):
        Knobs(fewer=share).check(8)


@pytest.mark.parametrize("knobs", [Knobs(entry=8), Knobs(exit=9), Knobs(exit=0)])
def test_a_boundary_that_the_model_has_not(knobs) -> None:
    with pytest.raises(InputError, match=r"--(entry|exit): expected a boundary from . to . \(8 layers\)"):
        knobs.check(8)
