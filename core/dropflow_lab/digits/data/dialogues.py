"""Training samples for finetuning: a picture, and several rounds of question and answer about it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from dropflow_lab.digits.data.glyphs import check_split
from dropflow_lab.digits.data.mix import shuffled
from dropflow_lab.digits.data.questions import Question
from dropflow_lab.digits.data.scenes import Scene, draw_scene, render


@dataclass(frozen=True)
class Dialogue:
    """Pictures, with rounds of question and answer about them."""

    images: tuple[Image.Image, ...]
    """RGB."""
    rounds: tuple[tuple[str, str], ...]
    """Question and answer of each round."""


class Dialogues(Dataset[Dialogue]):
    """Digits pictures with `rounds` different questions each, drawn on access.

    Kinds come in the proportions of `MIX`, as in the training of the dense checkpoint. Sample `index` depends on
    `split`, `seed`, `rounds` and `index` alone, so that a resumed run continues with the samples that an uninterrupted
    one would see. Raises `ValueError` if `split` is unknown or `rounds` is not positive.
    """

    def __init__(self, count: int, *, rounds: int = 1, seed: int = 0, split: str = "train") -> None:
        if rounds < 1:
            raise ValueError(f"expected at least one round, got {rounds}")
        self.count, self.rounds, self.seed, self.split = count, rounds, seed, check_split(split)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Dialogue:
        if not 0 <= index < self.count:
            raise IndexError(f"expected an index of 0..{self.count - 1}, got {index}")
        scene, questions = rounds_at(self.split, index, self.rounds, self.seed)
        rounds = tuple((question.text, question.answer) for question in questions)
        return Dialogue((Image.fromarray(render(scene)[0]),), rounds)


def rounds_at(split: str, index: int, rounds: int, seed: int = 0) -> tuple[Scene, list[Question]]:
    """Return scene and questions of sample `index`, without rendering the picture."""
    scene = draw_scene(split, (seed, 17, index))
    questions = shuffled(scene, np.random.default_rng([seed, 18, index]))
    return scene, list(islice(questions, rounds))
