"""Question-answer examples drawn from a seed, and folders of them for other commands to read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from dropflow_lab.digits.data.glyphs import SPLITS, check_split
from dropflow_lab.digits.data.questions import KINDS, Question, ask_all
from dropflow_lab.digits.data.scenes import Scene, draw_scene, render
from dropflow_lab.files import replacing


@dataclass(frozen=True)
class Example:
    """One picture with one question."""

    image: Image.Image
    """RGB, 96 x 96 pixels."""
    question: str
    answer: str
    kind: str
    """One of `KINDS`."""


def examples(split: str, count: int, seed: int = 0, *, digits: tuple[int, int] = (3, 6)) -> Iterator[Example]:
    """Yield `count` examples, each with its own scene, cycling through the kinds.

    The same (`split`, `seed`, `digits`) always gives the same examples; a larger `count` only appends. Raises
    `ValueError` if `split` is unknown.
    """
    check_split(split)
    for index in range(count):
        scene, question = question_at(split, index, seed, digits)
        yield Example(Image.fromarray(render(scene)[0]), question.text, question.answer, question.kind)


def question_at(split: str, index: int, seed: int = 0, digits: tuple[int, int] = (3, 6)) -> tuple[Scene, Question]:
    """Return scene and question of example `index`, without rendering the picture.

    If a scene has no question of the required kind, another scene is drawn.
    """
    kind = KINDS[index % len(KINDS)]
    attempt = 0
    while True:
        scene = draw_scene(split, (seed, index, attempt), digits)
        rng = np.random.default_rng([SPLITS.index(check_split(split)), seed, index, attempt, 1])
        asked = ask_all(scene)[kind]
        if kind == "exist":
            wanted = ("yes", "no")[int(rng.integers(2))]
            asked = [question for question in asked if question.answer == wanted]
        if asked:
            return scene, asked[int(rng.integers(len(asked)))]
        attempt += 1


def write_folder(path: Path, split: str, count: int, seed: int = 0) -> Path:
    """Write `images/*.png` and `data.jsonl`, and return the path of the latter.

    Each line holds `image` (relative to `path`), `question`, `answer` and `kind`. An existing `data.jsonl` is
    replaced.
    """
    table = path / "data.jsonl"
    with replacing(table) as part, part.open("w", encoding="utf-8") as lines:
        drawn = track(examples(split, count, seed), f"{split} pictures", total=count)
        for index, example in enumerate(drawn):
            name = f"images/{index:05d}.png"
            with replacing(path / name) as picture:
                example.image.save(picture)
            facts = {"question": example.question, "answer": example.answer, "kind": example.kind}
            lines.write(json.dumps({"image": name, **facts}) + "\n")
    return table
