"""What a row of the accuracy benchmark measures: a policy, on a model, for one seed or as the mean of several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import dropflow
from dropflow import Policy
from dropflow.backbone.backbone import backbone_for
from dropflow.policy.plan import resolve
from dropflow.policy.recorded import recorded_policy
from dropflow_lab.bench.accuracy import APART, DENSE, AccuracyRow, Bench, Share
from dropflow_lab.compare.digits_accuracy import Score

SEED = "{seed}"
"""Stands for 0, 1, ... in a row that is the mean of several seeds."""

Load = Callable[[str], tuple[Any, Any]]
"""Returns model and processor of a checkpoint name or folder; "" means the one all rows share."""


@dataclass(frozen=True)
class Subject:
    """One row to be."""

    label: str
    policy: str
    """Name or path; `DENSE` for none; empty for the one the model records."""
    model: str
    """Checkpoint name or folder; empty for the one all rows share."""

    @classmethod
    def parse(cls, text: str) -> Subject:
        """Read `POLICY` or `POLICY@MODEL`."""
        policy, _, model = text.partition("@")
        return cls(text, policy.strip(), model.strip())

    def members(self, seeds: int) -> list[Subject]:
        """Return one subject per seed where the text has the placeholder `SEED`, else this one."""
        if SEED not in self.label:
            return [self]
        texts = (self.label.replace(SEED, str(seed)) for seed in range(seeds))
        return [Subject.parse(text) for text in texts]


def bench_subjects(subjects: Sequence[Subject], load: Load, bench: Bench, seeds: int) -> Iterator[AccuracyRow]:
    """Yield a row per subject, in order, as soon as it is measured.

    Raises `PolicyError` for a policy that does not fit its model before anything is measured.
    """
    seeded = [(subject, subject.members(seeds)) for subject in subjects]
    models = {model: load(model) for model in dict.fromkeys(one.model for _, members in seeded for one in members)}
    plans = [(subject, [(_policy(one, models), one.model) for one in members]) for subject, members in seeded]
    for _, members in plans:
        for policy, model in members:
            if policy is not None:
                resolve(policy, backbone_for(models[model][0]).shape)
    for subject, members in plans:
        rows = [bench.row(*models[model], policy) for policy, model in members]
        yield mean(subject.label, rows) if SEED in subject.label else replace(rows[0], policy=_label(*members[0]))


def mean(label: str, rows: Sequence[AccuracyRow]) -> AccuracyRow:
    """Return the mean of rows on the same questions; its intervals are those of the questions at the mean."""
    overall = _mean([Share(row.accuracy, row.low, row.high, _asked(row)) for row in rows])
    kinds = {kind: _mean([row.kinds[kind] for row in rows]) for kind in rows[0].kinds}
    return AccuracyRow(
        policy=label,
        accuracy=overall.accuracy,
        low=overall.low,
        high=overall.high,
        average_visual_tokens=fmean(row.average_visual_tokens for row in rows),
        entry_visual_tokens=fmean(row.entry_visual_tokens for row in rows),
        count=kinds["count"],
        read=kinds["read"],
        kinds=kinds,
        answers=(),
        by_seed=tuple(row.accuracy for row in rows),
    )


def _policy(subject: Subject, models: Mapping[str, tuple[Any, Any]]) -> Policy | None:
    if subject.policy == DENSE:
        return None
    return dropflow.load_policy(subject.policy) if subject.policy else recorded_policy(models[subject.model][0].config)


def _label(policy: Policy | None, model: str) -> str:
    name = DENSE if policy is None else policy.name
    return f"{name}@{model}" if model else name


def _asked(row: AccuracyRow) -> int:
    return sum(share.asked for kind, share in row.kinds.items() if kind not in APART)


def _mean(shares: Sequence[Share]) -> Share:
    asked, accuracy = shares[0].asked, fmean(share.accuracy for share in shares)
    return Share(accuracy, *Score(accuracy * asked, asked).interval(), asked)
