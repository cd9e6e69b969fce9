"""Nine kinds of questions about a clip: what, where, when and how many; each only where one answer is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dropflow_lab.digits.data.clips import FRAMES, Actor, Clip, draw_clip
from dropflow_lab.digits.data.glyphs import SPLITS, check_split
from dropflow_lab.digits.data.questions import VOCABULARY

CLIP_WORDS: tuple[str, ...] = (*VOCABULARY, "frame", "first", "last", "with")
"""Words of prompts about clips, in the order of their ids: those about pictures, and a few more."""
HOW_MANY = ("count", "total")
"""Kinds that ask for numbers of digits: what they measure is rather how many tokens are left than what these show."""


@dataclass(frozen=True)
class ClipQuestion:
    """A question about a clip, and its answer."""

    text: str
    answer: str
    kind: str
    """One of `CLIP_KINDS`."""


def clip_question_at(split: str, index: int, seed: int = 0) -> tuple[Clip, ClipQuestion]:
    """Return clip and question of example `index`, without rendering the frames.

    The same (`split`, `index`, `seed`) always gives the same. If a clip has no question of the required kind, another
    one is drawn. Raises `ValueError` if `split` is unknown.
    """
    kind = CLIP_KINDS[index % len(CLIP_KINDS)]
    attempt = 0
    while True:
        clip = draw_clip(split, (seed, index, attempt))
        rng = np.random.default_rng([SPLITS.index(check_split(split)), seed, index, attempt, 9])
        asked = ask_clip(clip)[kind]
        if kind == "exist":
            wanted = ("yes", "no")[int(rng.integers(2))]
            asked = [question for question in asked if question.answer == wanted]
        if asked:
            return clip, asked[int(rng.integers(len(asked)))]
        attempt += 1


def ask_clip(clip: Clip) -> dict[str, list[ClipQuestion]]:
    """Return every question with an answer in the clip, by kind; a kind may have none."""
    return {kind: [ClipQuestion(text, answer, kind) for text, answer in ask(clip)] for kind, ask in _CLIP_KINDS.items()}


Asked = Iterator[tuple[str, str]]


def _only(clip: Clip) -> list[Actor]:
    """The digits whose class no other digit of the clip has."""
    times = Counter(actor.item.digit for actor in clip.actors)
    return [actor for actor in clip.actors if times[actor.item.digit] == 1]


def _c2d(clip: Clip) -> Asked:
    times = Counter(actor.item.color for actor in clip.actors)
    for actor in clip.actors:
        if times[actor.item.color] == 1:
            yield f"what digit is {actor.item.color} ?", str(actor.item.digit)


def _d2c(clip: Clip) -> Asked:
    return ((f"what color is the {actor.item.digit} ?", actor.item.color) for actor in _only(clip))


def _exist(clip: Clip) -> Asked:
    there = {actor.item.digit for actor in clip.actors}
    return ((f"is there a {digit} ?", "yes" if digit in there else "no") for digit in range(10))


def _frame(clip: Clip) -> Asked:
    for frame in range(FRAMES):
        if len(shown := clip.shown(frame)) == 1:
            yield f"what digit is in frame {frame + 1} ?", str(shown[0].item.digit)


def _where(clip: Clip) -> Asked:
    for actor in _only(clip):
        for frame in actor.seen:
            yield f"where is the {actor.item.digit} in frame {frame + 1} ?", str(actor.place(frame))


def _first(clip: Clip) -> Asked:
    return ((f"what is the first frame with the {one.item.digit} ?", str(one.seen[0] + 1)) for one in _only(clip))


def _last(clip: Clip) -> Asked:
    return ((f"what is the last frame with the {one.item.digit} ?", str(one.seen[-1] + 1)) for one in _only(clip))


def _count(clip: Clip) -> Asked:
    for frame in range(FRAMES):
        yield f"how many digits are in frame {frame + 1} ?", str(len(clip.shown(frame)))


def _total(clip: Clip) -> Asked:
    yield "how many digits are there ?", str(len(clip.actors))


_CLIP_KINDS: dict[str, Callable[[Clip], Asked]] = {
    "c2d": _c2d,
    "d2c": _d2c,
    "exist": _exist,
    "frame": _frame,
    "where": _where,
    "first": _first,
    "last": _last,
    "count": _count,
    "total": _total,
}
CLIP_KINDS: tuple[str, ...] = tuple(_CLIP_KINDS)
