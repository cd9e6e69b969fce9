"""The accuracy benchmark: policies on the digits questions, the same ones for all, with the tokens each really used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import dropflow
from dropflow import Policy
from dropflow.backbone import backbone_for
from dropflow.plan import resolve
from dropflow_lab.digits.dataset import Example, examples
from dropflow_lab.digits.evaluate import Score, answer, build_inputs

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
    file in `out`, under a name that follows from policy, weights, questions and seed; a row that is there is read
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
        self._out, self._questions, self._seed = out, questions, seed
        self._asked: list[Example] = []

    def row(self, model: Any, processor: Any, policy: Policy | None) -> AccuracyRow:
        """Return the row of `model` under `policy`, read from its file or measured now."""
        facts = {
            "policy": policy.to_dict() if policy is not None else DENSE,
            "weights": _digest_of_weights(model),
            "questions": self._questions,
            "seed": self._seed,
            "dropflow": version("dropflow"),
        }
        path = self._out / f"{policy.name if policy is not None else DENSE}-{_digest(facts)}.json"
        row = _read(path)
        if row is None:
            self._asked = self._asked or list(examples("test", self._questions, self._seed))
            row = _measure(model, processor, policy, self._asked)
            _write(path, {"measured": asdict(row), "facts": facts})
        return row


def default_folder() -> Path:
    """Return the folder for finished rows: `dropflow/bench-accuracy` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dropflow" / "bench-accuracy"


def _measure(model: Any, processor: Any, policy: Policy | None, asked: Sequence[Example]) -> AccuracyRow:
    name = DENSE if policy is None else policy.name
    batches = [list(asked[start : start + BATCH]) for start in range(0, len(asked), BATCH)]
    said: list[str] = []
    average = entry = 0.0
    with nullcontext() if policy is None else dropflow.attach(model, policy) as flow:
        for batch in track(batches, name):
            said += answer(model, processor, batch)
            if flow is None or not flow.plan.stages:
                tokens = _placeholders(model, processor, batch)
                average, entry = average + tokens, entry + tokens
            else:
                report = flow.report()
                average += report.average_visual_tokens * len(batch)
                entry += report.entry_visual_tokens * len(batch)
    return _row(name, asked, said, average / len(asked), entry / len(asked))


def _placeholders(model: Any, processor: Any, batch: list[Example]) -> int:
    """Visual tokens of a batch when nothing is dropped."""
    return int(backbone_for(model).placeholders(build_inputs(processor, batch)["input_ids"]).sum())


def _row(name: str, asked: Sequence[Example], said: Sequence[str], average: float, entry: float) -> AccuracyRow:
    right: dict[str, list[bool]] = {kind: [] for kind in APART}
    for example, given in zip(asked, said, strict=True):
        right.setdefault(example.kind, []).append(given == example.answer)
    kinds = {kind: Score(sum(hits), len(hits)) for kind, hits in right.items()}
    main = [score for kind, score in kinds.items() if kind not in APART]
    overall = Share.of(Score(sum(score.right for score in main), sum(score.asked for score in main)))
    shares = {kind: Share.of(score) for kind, score in kinds.items()}
    return AccuracyRow(
        policy=name,
        accuracy=overall.accuracy,
        low=overall.low,
        high=overall.high,
        average_visual_tokens=average,
        entry_visual_tokens=entry,
        count=shares["count"],
        read=shares["read"],
        kinds=shares,
        answers=tuple(said),
    )


def _read(path: Path) -> AccuracyRow | None:
    if not path.is_file():
        return None
    row = json.loads(path.read_text(encoding="utf-8"))["measured"]
    shares = {kind: Share(**row[kind]) for kind in APART}
    kinds = {kind: Share(**share) for kind, share in row["kinds"].items()}
    return AccuracyRow(**{**row, **shares, "kinds": kinds, "answers": tuple(row["answers"]), "by_seed": ()})


def _write(path: Path, result: Mapping[str, Any]) -> None:
    """Write in one step, so that a run that is killed leaves no half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=2), encoding="utf-8")
    part.replace(path)


def _digest_of_weights(model: Any) -> str:
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
