"""One row per policy: its answers compared with no policy and with random pruning, and its cost."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from dropflow_lab.compare.answers import Answers
from dropflow_lab.compare.cost import Cost
from dropflow_lab.inputs.data import Sample
from dropflow_lab.measure.intervals import Gain, Share


@dataclass(frozen=True)
class Title:
    """What a row is about."""

    policy: str
    """Name of the policy; `dense` for none."""
    model: str = ""
    """Name or folder of the model; empty where all rows share one."""
    rescaled: bool = False
    """Whether the policy was tuned for another shape, so that its numbers are scaled to this model."""
    persistent: bool = False
    """Whether positions are persistent instead of the compact ones that the policy was published with."""
    also: tuple[str, ...] = ()
    """Other policies that are equivalent on this model and were not measured again."""

    def __str__(self) -> str:
        """The policies, the model, and in brackets what is not as published."""
        notes = [*["persistent"] * self.persistent, *["rescaled"] * self.rescaled]
        names = ", ".join((self.policy, *self.also))
        return names + f"@{self.model}" * bool(self.model) + f" ({', '.join(notes)})" * bool(notes)


@dataclass(frozen=True)
class Member:
    """Measurements of one policy on one model: a row, or one seed of a row."""

    answers: Answers
    dense: Answers
    """Answers of the same model without a policy."""
    controls: tuple[Answers, ...] = ()
    """Answers under random pruning at equal average tokens, one for each seed of the draw."""
    no_control: str = ""
    """Why there are no controls."""
    cost: Cost | None = None


@dataclass(frozen=True)
class Control:
    """Random pruning before the LLM at the policy's own average tokens; means over seeds."""

    average_visual_tokens: float
    accuracy: Share | None
    """`None` where no question has a known answer."""
    agreement: Share
    gain: Gain
    """Gain of the policy over it, question by question: in accuracy, or in agreement if no answers are known."""
    seeds: int


@dataclass(frozen=True)
class Row:
    """One policy, or the mean of several that differ by a seed; intervals are 95 % (`dropflow_lab.measure`)."""

    title: Title
    average_visual_tokens: float
    """Visual tokens per decoder layer, averaged over all layers and all questions, as measured in each prefill."""
    average_visual_tokens_answer: float
    """The same, averaged over all forwards of each answer: fewer where stages evict while decoding."""
    entry_visual_tokens: float
    """Visual tokens handed to the LLM, averaged over all questions."""
    accuracy: Share | None
    """Right answers over all kinds that are not shown separately; `None` if no question has a known answer."""
    agreement: Share
    """Answers that are word for word those of the same model without a policy."""
    kinds: dict[str, Share]
    """Accuracy by kind of question, if the data distinguishes kinds."""
    control: Control | None
    no_control: str
    """Why a policy has no control."""
    cost: Cost | None
    """Cost of the first seed; `None` if only answers were measured."""
    by_seed: tuple[float, ...] = ()
    """Accuracy of each seed, if the row is a mean over seeds."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data, the fields of the title first."""
        data = asdict(self)
        title: dict[str, Any] = data.pop("title")
        if self.control is not None:
            data["control"]["verdict"] = self.control.gain.verdict
        return title | data


def make_row(title: Title, samples: Sequence[Sample], members: Sequence[Member], apart: Collection[str] = ()) -> Row:
    """Combine measurements on the same questions into a row; the kinds in `apart` are left out of accuracy and gain."""
    right = [_right(samples, member.answers) for member in members]
    known = [place for place, sample in enumerate(samples) if sample.answer is not None]
    main = [place for place in known if samples[place].kind not in apart]
    over_seeds = _means(right)
    kinds: dict[str, list[float]] = {}
    for place in known:
        kind = samples[place].kind
        if kind is not None:
            kinds.setdefault(kind, []).append(over_seeds[place])
    answers = [member.answers for member in members]
    return Row(
        title=title,
        average_visual_tokens=fmean(one.average_visual_tokens for one in answers),
        average_visual_tokens_answer=fmean(one.average_visual_tokens_answer for one in answers),
        entry_visual_tokens=fmean(one.entry_visual_tokens for one in answers),
        accuracy=_share(over_seeds, main),
        agreement=Share.of(_means([_same(member.answers, member.dense) for member in members])),
        kinds={kind: Share.of(values) for kind, values in kinds.items()},
        control=_control(samples, members, main) if any(member.controls for member in members) else None,
        no_control=members[0].no_control,
        cost=members[0].cost,
        by_seed=tuple(fmean(one[place] for place in main) for one in right) if main and len(members) > 1 else (),
    )


def _control(samples: Sequence[Sample], members: Sequence[Member], main: Sequence[int]) -> Control:
    controls = [control for member in members for control in member.controls]
    right = _means([_right(samples, control) for control in controls])
    same = _means([_same(control, member.dense) for member in members for control in member.controls])
    if main:
        own, other, asked = _means([_right(samples, member.answers) for member in members]), right, main
    else:
        own, other = _means([_same(member.answers, member.dense) for member in members]), same
        asked = range(len(samples))
    return Control(
        average_visual_tokens=fmean(one.average_visual_tokens_answer for one in controls),
        accuracy=_share(right, main),
        agreement=Share.of(same),
        gain=Gain.of([own[place] for place in asked], [other[place] for place in asked]),
        seeds=len(controls),
    )


def _right(samples: Sequence[Sample], answers: Answers) -> list[float]:
    """1 for a right answer, 0 for a wrong one and where none is known."""
    return [float(sample.is_answered_by(said)) for sample, said in zip(samples, answers.said, strict=True)]


def _same(answers: Answers, dense: Answers) -> list[float]:
    return [float(said == plain) for said, plain in zip(answers.said, dense.said, strict=True)]


def _means(values: Sequence[Sequence[float]]) -> list[float]:
    """Mean of each question."""
    return [fmean(one) for one in zip(*values, strict=True)]


def _share(values: Sequence[float], places: Sequence[int]) -> Share | None:
    return Share.of([values[place] for place in places]) if places else None
