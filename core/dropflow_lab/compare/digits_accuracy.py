"""Accuracy of a model on the digits questions, through the standard path: processor, generate, decode."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from rich.progress import track
from rich.table import Table
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

import dropflow
from dropflow_lab.digits.data.dataset import Example, examples
from dropflow_lab.digits.data.questions import KINDS
from dropflow_lab.inputs import prompts
from dropflow_lab.measure.intervals import wilson

LONGEST_ANSWER = 12
"""Tokens of the longest answer to a digits question, with some to spare."""
TEST_QUESTIONS, TEST_SEED = 2000, 2026
"""Number and seed of the questions, all of the test split, that test a checkpoint trained from scratch."""


@dataclass(frozen=True)
class Score:
    """Number of right answers among the questions asked."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        """Share of right answers, 0..1; 0 if nothing was asked."""
        return self.right / self.asked if self.asked else 0.0

    def interval(self) -> tuple[float, float]:
        """Return the 95 % Wilson interval of the share; (0, 1) if nothing was asked."""
        return wilson(self.share, self.asked)


@dataclass(frozen=True)
class Accuracy:
    """Exact-match accuracy, overall and per kind of question."""

    overall: Score
    kinds: dict[str, Score]
    answers: tuple[str, ...]
    """The model's answers, in the order of the questions."""

    def to_json(self) -> str:
        """Return shares, intervals and counts as a JSON object."""
        rows = {"overall": self.overall, **self.kinds}
        facts = {
            name: {
                "right": score.right,
                "asked": score.asked,
                "share": round(score.share, 4),
                "interval": [round(bound, 4) for bound in score.interval()],
            }
            for name, score in rows.items()
        }
        return json.dumps(facts, indent=2)

    def table(self) -> Table:
        """Return a table for the terminal."""
        table = Table("questions", "right", "asked", "share", "95 % interval")
        for name, score in (("overall", self.overall), *self.kinds.items()):
            low, high = score.interval()
            table.add_row(name, str(score.right), str(score.asked), f"{score.share:.1%}", f"{low:.1%} .. {high:.1%}")
        return table


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    split: str = "test",
    count: int = 1000,
    seed: int = 0,
    batch_size: int = 32,
    *,
    progress: bool = True,
) -> Accuracy:
    """Ask `count` questions and compare the greedy answers with the right ones, word for word.

    The model is used unchanged: its mode, dtype and device, and whatever policy is attached to it.
    """
    asked: dict[str, int] = dict.fromkeys(KINDS, 0)
    right: dict[str, int] = dict.fromkeys(KINDS, 0)
    said: list[str] = []
    batches = _batched(examples(split, count, seed), batch_size)
    total = math.ceil(count / batch_size)
    for batch in track(batches, f"{split} questions", total=total, disable=not progress):
        answers = answer(model, processor, batch)
        for example, given in zip(batch, answers, strict=True):
            asked[example.kind] += 1
            right[example.kind] += given == example.answer
        said.extend(answers)
    kinds = {kind: Score(right[kind], asked[kind]) for kind in KINDS if asked[kind]}
    return Accuracy(Score(sum(right.values()), sum(asked.values())), kinds, tuple(said))


def answer(model: PreTrainedModel, processor: ProcessorMixin, batch: list[Example]) -> list[str]:
    """Return the model's greedy answers to a batch of examples."""
    with dropflow.questions([one.question for one in batch]):
        return prompts.generate(model, processor, build_inputs(processor, batch), LONGEST_ANSWER)


def build_inputs(processor: ProcessorMixin, batch: list[Example]) -> BatchFeature:
    """Return the model's inputs for a batch of examples, padded, on the CPU."""
    inputs: BatchFeature = prompts.build_inputs(processor, [([one.image], one.question) for one in batch])
    return inputs


def _batched(source: Iterable[Example], size: int) -> Iterator[list[Example]]:
    rows = iter(source)
    while batch := list(islice(rows, size)):
        yield batch
