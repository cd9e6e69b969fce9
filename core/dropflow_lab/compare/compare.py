"""Measures the rows of a comparison on the same questions, and stores each finished measurement in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from pydantic import TypeAdapter

import dropflow
from dropflow import Policy
from dropflow.backbone.backbone import backbone_for
from dropflow_lab.compare.answers import Answers, ask
from dropflow_lab.compare.cost import Cost, measure_cost
from dropflow_lab.compare.lineup import DENSE, Entry, Models
from dropflow_lab.compare.rows import Member, Row, make_row
from dropflow_lab.errors import InputError
from dropflow_lab.inputs.data import Picture, Sample
from dropflow_lab.inputs.images import cell_of, downsample
from dropflow_lab.store.claims import in_order
from dropflow_lab.store.digests import digest_of_code, digest_of_questions, digest_of_weights
from dropflow_lab.store.finished import Finished

_INSTRUMENTS = ("dropflow_lab.compare.answers", "dropflow_lab.compare.cost", "dropflow_lab.measure")


@dataclass(frozen=True)
class Rules:
    """Settings that are the same for all policies."""

    batch: int = 32
    """Questions per batch; tokens and answers do not depend on it."""
    max_new_tokens: int = 16
    """Maximum length of an answer, in tokens."""
    control_seeds: int = 1
    """Seeds of each policy's control, random pruning at equal average tokens; 0 leaves the control out."""
    timed: int = 4
    """Number of questions, from the first on, on which cost is measured; 0 leaves cost out."""
    rounds: int = 3
    """Rounds of paired timing; 0 counts work and times nothing."""
    downsample: tuple[int, ...] = ()
    """Numbers of visual tokens to downsample pictures to, each a row of the model without a policy."""
    apart: tuple[str, ...] = ()
    """Kinds of questions that are shown separately and left out of accuracy and gain."""


def compare(
    entries: Sequence[Entry], models: Models, samples: Sequence[Sample], finished: Finished, rules: Rules | None = None
) -> Iterator[Row]:
    """Yield the rows in order, each as soon as it is measured; finished measurements are read, not repeated.

    Rows of downsampled pictures follow the row of their model without a policy. Processes that compare the same on the
    same folder share the measurements, and all of them yield every row.
    """
    rules = rules or Rules()
    measuring = {name: Comparing(*loaded, samples, finished, rules) for name, loaded in models.items()}
    return in_order(_rows(entries, measuring, rules))


def _rows(entries: Sequence[Entry], measuring: Mapping[str, Comparing], rules: Rules) -> Iterator[Callable[[], Row]]:
    """What measures each row."""
    for entry in entries:
        yield partial(_row, entry, measuring)
        if entry.title.policy == DENSE:
            for tokens in rules.downsample:
                yield partial(_row_downsampled, entry, measuring[entry.title.model], tokens)


def _row(entry: Entry, measuring: Mapping[str, Comparing]) -> Row:
    members = [
        measuring[model].member(policy, with_cost=not number) for number, (model, policy) in enumerate(entry.members)
    ]
    (model, _), *_ = entry.members
    return make_row(entry.title, measuring[model].samples, members, measuring[model].rules.apart)


def _row_downsampled(entry: Entry, measuring: Comparing, tokens: int) -> Row:
    title = replace(entry.title, policy=f"downsample-{tokens}")
    return make_row(title, measuring.samples, [measuring.downsampled(tokens)], measuring.rules.apart)


class Comparing:
    """Measures policies of one model on the same questions; finished measurements are read, not repeated.

    Raises `claims.Taken` where another process is measuring what is asked for.
    """

    def __init__(self, model: Any, processor: Any, samples: Sequence[Sample], finished: Finished, rules: Rules) -> None:
        self._model, self._processor, self.samples = model, processor, samples
        self._finished, self.rules = finished, rules
        self._weights, self._questions = digest_of_weights(model), digest_of_questions(samples)

    def member(self, policy: Policy | None, *, with_cost: bool = True) -> Member:
        """Measure one policy (`None`: the model without one), its controls and its cost."""
        answers, dense = self._answers(policy), self._answers(None)
        cost = self._cost(policy) if with_cost else None
        if policy is None:
            return Member(answers, dense, cost=cost)
        keep = self._share_of(answers.average_visual_tokens_answer)
        if keep is None:
            return Member(answers, dense, (), "as many visual tokens as without a policy", cost)
        per = "video" if self._only_videos else "image"
        controls = tuple(self._answers(_random(keep, seed, per)) for seed in range(self.rules.control_seeds))
        return Member(answers, dense, controls, "" if controls else "not asked for", cost)

    def downsampled(self, tokens: int) -> Member:
        """Measure the model without a policy on pictures downsampled to `tokens` visual tokens."""
        answers = self._answers(None, smaller(self.samples, tokens, self._cell()), f"downsample-{tokens}")
        return Member(answers, self._answers(None))

    def _share_of(self, average: float) -> int | float | None:
        """Tokens per image that give this average: a count, or a share if images differ in size; `None` for all.

        Where all questions are about videos alone, and each about one, these are tokens per video.
        """
        whole = self._answers(None).entry_visual_tokens
        if self._only_videos:
            count = max(1, round(average))
            if len({len(sample.pictures) for sample in self.samples}) > 1 or whole != round(whole):
                return max(average, 1) / whole if average < whole else None
            return count if count < whole else None
        each = backbone_for(self._model).tokens_per_image
        if each is None or whole != round(whole):
            return max(average, 1) / whole if average < whole else None
        count = max(1, round(average * each / whole))
        return count if count < each else None

    @property
    def _only_videos(self) -> bool:
        """Whether every question is about one video, and no other picture."""
        return all([len(video) for video in sample.videos] == [len(sample.pictures)] for sample in self.samples)

    def _answers(self, policy: Policy | None, asked: Sequence[Sample] = (), name: str = "") -> Answers:
        """Answers to `asked` (if empty, all questions of the comparison), stored under `name` or the policy's name."""
        rules, samples = self.rules, asked or self.samples
        facts = self._facts(samples) | _about(policy) | {"max_new_tokens": rules.max_new_tokens}
        file = f"answers-{name or (DENSE if policy is None else policy.name)}"
        how = {"batch": rules.batch, "max_new_tokens": rules.max_new_tokens}
        measure = partial(ask, self._model, self._processor, policy, samples, **how)
        return self._finished.once(file, facts, measure, partial(read_answers, questions=len(samples)), asdict)

    def _facts(self, samples: Sequence[Sample]) -> dict[str, Any]:
        same = samples is self.samples
        return {"weights": self._weights, "questions": self._questions if same else digest_of_questions(samples)}

    def _cell(self) -> int:
        cell = cell_of(self._model.config)
        if cell is None:
            raise InputError(
                "downsample: the model's config names no patch size, so pixels per token are unknown; leave it out"
            )
        return cell

    def _cost(self, policy: Policy | None) -> Cost | None:
        rules = self.rules
        if not rules.timed:
            return None
        facts = self._facts(self.samples) | _about(policy) | {"timed": rules.timed, "rounds": rules.rounds}
        name = f"cost-{DENSE if policy is None else policy.name}"
        plain = None if policy is None else self._cost(None)
        how: dict[str, Any] = {"rounds": rules.rounds, "dense": None if plain is None else plain.work}
        measure = partial(measure_cost, self._model, self._processor, policy, self.samples[: rules.timed], **how)
        return self._finished.once(name, facts, measure, TypeAdapter(Cost).validate_python, asdict)


def smaller(samples: Sequence[Sample], tokens: int, cell: int) -> list[Sample]:
    """Return the samples with pictures of at most `tokens` cells (see `images.downsample`), downsampled when opened."""

    def shrunk(picture: Picture) -> Picture:
        return Picture(f"{picture.name}@{tokens}", lambda: downsample(picture.open(), tokens, cell))

    return [replace(sample, pictures=tuple(map(shrunk, sample.pictures))) for sample in samples]


def _random(keep: int | float, seed: int, per: str) -> Policy:
    """Random pruning before the LLM, per image or per video, shared by policies with about the same average."""
    stage = {"use": "control/random", "encode": keep, "seed": seed} | ({"per": per} if per != "image" else {})
    return dropflow.load_policy({"name": f"random-{float(f'{keep:.3g}'):g}-seed-{seed}", "stages": {"random": stage}})


def _about(policy: Policy | None) -> dict[str, Any]:
    return {"policy": DENSE if policy is None else policy.to_dict(), "code": digest_of_code([policy], _INSTRUMENTS)}


def read_answers(found: Any, questions: int) -> Answers:
    """Parse stored answers to `questions` questions; raises `ValueError` if the data does not fit."""
    answers = TypeAdapter(Answers).validate_python(found)
    if len(answers.said) != questions:
        raise ValueError(f"{len(answers.said)} answers to {questions} questions")
    return answers
