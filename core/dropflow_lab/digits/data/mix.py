"""Proportions in which kinds of questions are drawn for training."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dropflow_lab.digits.data.questions import KINDS, Question, ask_all
from dropflow_lab.digits.data.scenes import Scene

MIX = {
    "pos": 0.09,
    "where": 0.09,
    "exist": 0.05,
    "count": 0.04,
    "c2d": 0.18,
    "d2c": 0.22,
    "rel": 0.12,
    "maxmin": 0.08,
    "read": 0.06,
    "sum": 0.07,
}
"""Share of each kind. Binding colour to digit is learned last, so it makes up two fifths of the mix."""


def shuffled(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """Yield all questions about the scene in random order, kinds in the proportions of `MIX` as long as they last."""
    asked = ask_all(scene)
    for questions in asked.values():
        rng.shuffle(questions)
    asked["exist"] = _balanced(asked["exist"], rng)
    while left := [kind for kind in KINDS if asked[kind]]:
        weights = np.asarray([MIX[kind] for kind in left])
        yield asked[left[int(rng.choice(len(left), p=weights / weights.sum()))]].pop()


def _balanced(questions: list[Question], rng: np.random.Generator) -> list[Question]:
    """Return as many yes as no questions, in pairs of random order, since questions are taken from the end."""
    sides = {answer: [q for q in questions if q.answer == answer] for answer in ("yes", "no")}
    pairs = [side for pair in zip(sides["yes"], sides["no"], strict=False) for side in pair]
    for start in range(0, len(pairs), 2):
        if rng.integers(2):
            pairs[start], pairs[start + 1] = pairs[start + 1], pairs[start]
    return pairs
