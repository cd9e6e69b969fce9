"""The policies of the trained digits checkpoints: their budgets, and that the profiler's rule gives them."""

from __future__ import annotations

import pytest

import dropflow
from dropflow.lifecycle.stage import Window
from dropflow.policy.plan import resolve
from dropflow.units import BackboneShape
from dropflow_lab.profile.rule import choose_keeps, choose_prunes

DIGITS = BackboneShape(12, 144)
ILVAS = [0.395, 0.417, 0.454, 0.448, 0.512, 0.458, 0.434, 0.498, 0.455]
"""Of the dense checkpoint at boundaries 0 to 8, from the table in docs/profile.md."""
LATEST_FIRST = 5


@pytest.mark.parametrize(
    ("name", "per_layer"),
    [
        ("hidrop-digits", [0] * 3 + [144] + [66] * 3 + [30] * 3 + [0] * 2),
        ("hidrop-digits-90", [0] * 3 + [48] + [28] * 3 + [13] * 3 + [0] * 2),
    ],
)
def test_visual_tokens_of_each_layer(name: str, per_layer: list[int]) -> None:
    schedule = resolve(dropflow.load_policy(name), DIGITS).schedule()
    assert list(schedule.per_layer) == per_layer


def test_three_quarters_and_nine_tenths_are_saved() -> None:
    averages = [resolve(dropflow.load_policy(f"hidrop-digits{end}"), DIGITS).schedule().average for end in ("", "-90")]
    assert averages == [144 * 0.25, 14.25]
    assert averages[1] <= 144 * 0.1


def test_with_an_entry_at_3_the_profilers_rule_gives_the_pyramid() -> None:
    window = Window(3, 10)
    prunes = choose_prunes(ILVAS, window, 4, LATEST_FIRST)
    keep = choose_keeps(36, 12, 144, window, prunes)
    stages = dropflow.load_policy("hidrop-digits").to_dict()["stages"]
    assert (stages["inject"]["at"], stages["exit"]["at"]) == (window.entry, window.exit)
    assert stages["pyramid"]["keep"] == keep == {4: 66, 7: 30}
