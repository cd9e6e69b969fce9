"""The accuracy benchmark: policies on the digits questions, the same ones for all, with the tokens each really used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dropflow
from dropflow import Policy
from dropflow.backbone.backbone import backbone_for
from dropflow.policy.plan import resolve
from dropflow_lab.compare.answers import Answers, ask
from dropflow_lab.compare.digits_accuracy import LONGEST_ANSWER, Score
from dropflow_lab.compare.store import Finished, digest_of_code, digest_of_weights
from dropflow_lab.inputs.data import DIGITS, Sample, read_samples

DENSE = "dense"
"""Name of the row without a policy."""
APART = ("count", "read")
"""Kinds of questions shown apart: `count` measures how many tokens are left more than what they show, and `read` needs
every digit and several decode steps."""
BATCH = 32


@dataclass(frozen=True)
class Share:
    """Share of right answers with its 95 % interval (Wilson)."""

    accuracy: float
    low: float
    high: float
    asked: int

    @classmethod
    def of(cls, score: Score) -> Share:
        """Return the share of a score."""
        return cls(score.share, *score.interval(), score.asked)


@dataclass(frozen=True)
class AccuracyRow:
    """What one policy got right, and with how many visual tokens."""

    policy: str
    accuracy: float
    """Share of right answers, all kinds but those shown apart."""
    low: float
    high: float
    """The 95 % interval of `accuracy`."""
    average_visual_tokens: float
    """Visual tokens per decoder layer, averaged over all layers and all questions, as measured in each prefill."""
    entry_visual_tokens: float
    """Visual tokens handed to the LLM, averaged over all questions."""
    count: Share
    read: Share
    kinds: dict[str, Share]
    """Every kind of question by itself."""
    answers: tuple[str, ...]
    """What the model said, in the order of the questions, so that policies can be compared question by question."""
    by_seed: tuple[float, ...] = ()
    """Accuracy of each seed, where the row is their mean (see `dropflow_lab.bench.subjects`)."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data, without the answers."""
        row = asdict(self)
        del row["answers"]
        return row


def bench_accuracy(
    model: Any, processor: Any, policies: Sequence[str | Path | Policy], out: Path, *, questions: int, seed: int
) -> Iterator[AccuracyRow]:
    """Yield a row for the model without a policy, and then one per policy, as soon as each is measured.

    Every policy is asked the same `questions` of the test split, drawn from `seed`. Each finished row is written to a
    file in `out`, under a name that follows from policy, code, weights, questions and seed; a row that is there is read
    and not measured again. Raises `PolicyError` for a policy that does not fit the model, before anything is measured.
    """
    bench = Bench(out, questions, seed)
    chosen = [dropflow.load_policy(policy) for policy in policies]
    for policy in chosen:
        resolve(policy, backbone_for(model).shape)
    for which in (None, *chosen):
        yield bench.row(model, processor, which)


class Bench:
    """Measures rows on the same `questions` of the test split, and keeps finished ones in the folder `out`."""

    def __init__(self, out: Path, questions: int, seed: int) -> None:
        self._finished, self._questions, self._seed = Finished(out), questions, seed
        self._asked: list[Sample] = []

    def row(self, model: Any, processor: Any, policy: Policy | None) -> AccuracyRow:
        """Return the row of `model` under `policy`, read from its file or measured now."""
        name = policy.name if policy is not None else DENSE
        facts = {
            "policy": policy.to_dict() if policy is not None else DENSE,
            "code": digest_of_code(policy),
            "weights": digest_of_weights(model),
            "questions": self._questions,
            "seed": self._seed,
        }
        found = self._finished.read(name, facts)
        if found is not None:
            return _read(found)
        self._asked = self._asked or read_samples(DIGITS, self._questions, self._seed)
        answers = ask(model, processor, policy, self._asked, batch=BATCH, max_new_tokens=LONGEST_ANSWER)
        row = _row(name, self._asked, answers)
        self._finished.write(name, facts, asdict(row))
        return row


def default_folder() -> Path:
    """Return the folder for finished rows: `dropflow/bench-accuracy` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dropflow" / "bench-accuracy"


def _row(name: str, asked: Sequence[Sample], answers: Answers) -> AccuracyRow:
    right: dict[str, list[bool]] = {kind: [] for kind in APART}
    for sample, given in zip(asked, answers.said, strict=True):
        right.setdefault(str(sample.kind), []).append(given == sample.answer)
    kinds = {kind: Score(sum(hits), len(hits)) for kind, hits in right.items()}
    main = [score for kind, score in kinds.items() if kind not in APART]
    overall = Share.of(Score(sum(score.right for score in main), sum(score.asked for score in main)))
    shares = {kind: Share.of(score) for kind, score in kinds.items()}
    return AccuracyRow(
        policy=name,
        accuracy=overall.accuracy,
        low=overall.low,
        high=overall.high,
        average_visual_tokens=answers.average_visual_tokens,
        entry_visual_tokens=answers.entry_visual_tokens,
        count=shares["count"],
        read=shares["read"],
        kinds=shares,
        answers=answers.said,
    )


def _read(row: dict[str, Any]) -> AccuracyRow:
    shares = {kind: Share(**row[kind]) for kind in APART}
    kinds = {kind: Share(**share) for kind, share in row["kinds"].items()}
    return AccuracyRow(**{**row, **shares, "kinds": kinds, "answers": tuple(row["answers"]), "by_seed": ()})
