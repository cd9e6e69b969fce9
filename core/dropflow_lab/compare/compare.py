"""Runs policies on the same questions, one finished file per measurement, and yields their rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from pydantic import TypeAdapter

import dropflow
from dropflow import Policy
from dropflow.backbone.backbone import backbone_for
from dropflow.errors import DropflowError
from dropflow.policy.plan import resolve
from dropflow_lab.compare.answers import Answers, ask
from dropflow_lab.compare.cost import Cost, measure_cost
from dropflow_lab.compare.rows import Row, make_row
from dropflow_lab.compare.store import Finished, digest_of_code, digest_of_weights
from dropflow_lab.errors import InputError
from dropflow_lab.inputs.data import Picture, Sample
from dropflow_lab.inputs.images import cell_of, downsample

DENSE = "dense"
"""Name of the row without a policy."""


@dataclass(frozen=True)
class Rules:
    """What is the same for all policies."""

    batch: int = 32
    """Questions answered at once; tokens and answers do not depend on it."""
    max_new_tokens: int = 16
    """Longest answer."""
    control_seeds: int = 1
    """Seeds of random pruning at equal average tokens, beside every policy; 0 leaves the control out."""
    timed: int = 4
    """First questions on which cost is measured; 0 leaves cost out."""
    rounds: int = 3
    """Rounds of paired timing; 0 counts work and times nothing."""
    downsample: tuple[int, ...] = ()
    """Visual tokens whose worth of pixels a picture keeps, each a row of the model without a policy."""


def fitting(
    model: Any, sources: Sequence[str | Mapping[str, Any] | Policy], overrides: Sequence[str] = ()
) -> tuple[list[Policy], dict[str, str]]:
    """Return the policies that fit the model, and the reason for each that does not, by its name."""
    backbone = backbone_for(model)
    fit: list[Policy] = []
    refused: dict[str, str] = {}
    for source in sources:
        try:
            policy = dropflow.load_policy(source, overrides)
            resolve(policy, backbone.shape)
            with dropflow.attach(model, policy):  # what a backbone cannot give is refused here
                fit.append(policy)
        except DropflowError as error:
            refused[str(getattr(source, "name", source))] = str(error)
    return fit, refused


class Comparing:
    """Policies of one model on the same questions; finished measurements are read and not run again."""

    def __init__(
        self, model: Any, processor: Any, samples: Sequence[Sample], finished: Finished, rules: Rules | None = None
    ) -> None:
        self._model, self._processor, self._samples = model, processor, samples
        self._finished, self._rules = finished, rules or Rules()
        self._weights = digest_of_weights(model)

    def rows(self, policies: Sequence[Policy]) -> Iterator[Row]:
        """Yield the row of the model without a policy, then one per policy, each as soon as it is measured."""
        dense = self._answers(None)
        yield make_row(DENSE, self._samples, dense, dense, cost=self._cost(None))
        for tokens in self._rules.downsample:
            answers = self._answers(None, smaller(self._samples, tokens, self._cell()), f"downsample-{tokens}")
            yield make_row(f"downsample-{tokens}", self._samples, answers, dense)
        for policy in policies:
            answers = self._answers(policy)
            seeds = range(self._rules.control_seeds)
            controls = [self._answers(self._control(answers.average_visual_tokens, seed)) for seed in seeds]
            yield make_row(policy.name, self._samples, answers, dense, controls, self._cost(policy))

    def _control(self, average: float, seed: int) -> Policy:
        """Random pruning before the LLM at this average: a count, or a share where images differ in size."""
        whole = self._answers(None).entry_visual_tokens
        fixed = backbone_for(self._model).tokens_per_image is not None and whole == round(whole)
        images = whole / (backbone_for(self._model).tokens_per_image or whole)
        keep = max(1, round(average / images)) if fixed else min(1.0, average / whole)
        stage = {"use": "control/random", "encode": keep, "seed": seed}
        return dropflow.load_policy({"name": f"random-{average:.0f}-seed-{seed}", "stages": {"random": stage}})

    def _answers(self, policy: Policy | None, asked: Sequence[Sample] = (), name: str = "") -> Answers:
        """Answers to `asked` (the questions of the comparison, if empty), under the name of the policy or another."""
        rules, samples = self._rules, asked or self._samples
        facts = self._facts(samples) | _about(policy) | {"max_new_tokens": rules.max_new_tokens}
        file = f"answers-{name or (DENSE if policy is None else policy.name)}"
        found: Answers | None = self._finished.read(file, facts, partial(read_answers, questions=len(samples)))
        if found is not None:
            return found
        how = {"batch": rules.batch, "max_new_tokens": rules.max_new_tokens}
        answers = ask(self._model, self._processor, policy, samples, **how)
        self._finished.write(file, facts, asdict(answers))
        return answers

    def _facts(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return {"weights": self._weights, "questions": _digest_of(samples)}

    def _cell(self) -> int:
        cell = cell_of(self._model.config)
        if cell is None:
            raise InputError("downsample: this model's config names no patch size, so pixels per token are not known")
        return cell

    def _cost(self, policy: Policy | None) -> Cost | None:
        rules = self._rules
        if not rules.timed:
            return None
        facts = self._facts(self._samples) | _about(policy) | {"timed": rules.timed, "rounds": rules.rounds}
        name = f"cost-{DENSE if policy is None else policy.name}"
        found: Cost | None = self._finished.read(name, facts, TypeAdapter(Cost).validate_python)
        if found is None:
            asked = self._samples[: rules.timed]
            plain = None if policy is None else self._cost(None)
            dense = None if plain is None else plain.work
            cost = measure_cost(self._model, self._processor, policy, asked, rounds=rules.rounds, dense=dense)
            self._finished.write(name, facts, asdict(cost))
            return cost
        return found


def smaller(samples: Sequence[Sample], tokens: int, cell: int) -> list[Sample]:
    """Return the samples with pictures of at most `tokens` cells (see `images.downsample`), made when opened."""

    def shrunk(picture: Picture) -> Picture:
        return Picture(f"{picture.name}@{tokens}", lambda: downsample(picture.open(), tokens, cell))

    return [replace(sample, pictures=tuple(map(shrunk, sample.pictures))) for sample in samples]


def _about(policy: Policy | None) -> dict[str, Any]:
    return {"policy": DENSE if policy is None else policy.to_dict(), "code": digest_of_code(policy)}


def _digest_of(samples: Sequence[Sample]) -> str:
    """Digest of questions, answers and the names of pictures; a picture that changes under its name is not noticed."""
    digest = hashlib.sha256()
    for sample in samples:
        names = [picture.name for picture in sample.pictures]
        digest.update(repr((names, sample.question, sample.answer, sample.kind)).encode())
    return digest.hexdigest()


def read_answers(found: Any, questions: int) -> Answers:
    """Return what was written of answers to so many `questions`; raises `ValueError` where it is no such thing."""
    answers = TypeAdapter(Answers).validate_python(found)
    if len(answers.said) != questions:
        raise ValueError(f"{len(answers.said)} answers to {questions} questions")
    return answers
