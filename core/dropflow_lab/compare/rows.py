"""One row per policy: how it answers, beside the model without a policy and beside random pruning, and its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dropflow_lab.compare.answers import Answers
from dropflow_lab.compare.cost import Cost
from dropflow_lab.inputs.data import Sample
from dropflow_lab.measure.intervals import Mean


@dataclass(frozen=True)
class Control:
    """Random pruning before the LLM at the policy's own average tokens; means over seeds."""

    average_visual_tokens: float
    accuracy: Mean | None
    """`None` where no question has a known answer."""
    agreement: Mean
    gain: Mean
    """What the policy is above it, question by question: in accuracy, or in agreement where no answers are known."""
    seeds: int


@dataclass(frozen=True)
class Row:
    """One policy; intervals are 95 %, by bootstrap over questions."""

    policy: str
    average_visual_tokens: float
    """Visual tokens per decoder layer, averaged over all layers and all questions, as measured in each prefill."""
    entry_visual_tokens: float
    """Visual tokens handed to the LLM, averaged over all questions."""
    accuracy: Mean | None
    """Share of right answers; `None` where no question has a known answer."""
    agreement: Mean
    """Share of answers that are, word for word, those without a policy."""
    kinds: dict[str, Mean]
    """Accuracy by kind of question, where the data tells kinds apart."""
    control: Control | None
    """`None` for the model without a policy, and where no control was asked for."""
    cost: Cost | None
    """`None` where only answers were wanted."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def make_row(
    policy: str,
    samples: Sequence[Sample],
    answers: Answers,
    dense: Answers,
    controls: Sequence[Answers] = (),
    cost: Cost | None = None,
) -> Row:
    """Join what was measured of one policy, the model without one, and its controls, all on the same questions."""
    right = _right(samples, answers)
    kinds: dict[str, list[float]] = {}
    for sample, value in zip(samples, right, strict=True):
        if sample.kind is not None and value is not None:
            kinds.setdefault(sample.kind, []).append(value)
    return Row(
        policy=policy,
        average_visual_tokens=answers.average_visual_tokens,
        entry_visual_tokens=answers.entry_visual_tokens,
        accuracy=_mean(right),
        agreement=Mean.of(_same(answers, dense)),
        kinds={kind: Mean.of(values) for kind, values in kinds.items()},
        control=_control(samples, answers, dense, controls) if controls else None,
        cost=cost,
    )


def _control(samples: Sequence[Sample], answers: Answers, dense: Answers, controls: Sequence[Answers]) -> Control:
    right = [_right(samples, control) for control in controls]
    same = [_same(control, dense) for control in controls]
    known = [place for place, sample in enumerate(samples) if sample.answer is not None]
    own, others = _right(samples, answers), right
    if not known:
        own, others, known = list(_same(answers, dense)), [list(one) for one in same], list(range(len(samples)))
    gains = [_number(own[place]) - sum(_number(one[place]) for one in others) / len(others) for place in known]
    over_seeds = [
        None if samples[place].answer is None else sum(_number(one[place]) for one in right) / len(right)
        for place in range(len(samples))
    ]
    return Control(
        average_visual_tokens=sum(one.average_visual_tokens for one in controls) / len(controls),
        accuracy=_mean(over_seeds),
        agreement=Mean.of([sum(values) / len(values) for values in zip(*same, strict=True)]),
        gain=Mean.of(gains),
        seeds=len(controls),
    )


def _right(samples: Sequence[Sample], answers: Answers) -> list[float | None]:
    """1 for a right answer, 0 for a wrong one, `None` where none is known."""
    return [
        None if sample.answer is None else float(sample.is_answered_by(said))
        for sample, said in zip(samples, answers.said, strict=True)
    ]


def _same(answers: Answers, dense: Answers) -> list[float]:
    return [float(said == plain) for said, plain in zip(answers.said, dense.said, strict=True)]


def _mean(values: Sequence[float | None]) -> Mean | None:
    known = [value for value in values if value is not None]
    return Mean.of(known) if known else None


def _number(value: float | None) -> float:
    return 0.0 if value is None else value
