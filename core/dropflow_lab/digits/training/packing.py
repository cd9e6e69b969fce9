"""Training batches: many independent questions after one picture, in one row.

A row is `<s> user : [visual tokens] question answer question answer ...`. Position ids restart after the
picture for each question and the mask is block-diagonal there, so that every question sees only the picture and itself:
the losses are those of the unpacked prompts, at a fraction of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow_lab.digits.checkpoints.model import PIXEL_MEAN, PIXEL_STD
from dropflow_lab.digits.data.clip_questions import ClipQuestion
from dropflow_lab.digits.data.mix import shuffled
from dropflow_lab.digits.data.questions import KINDS, VOCABULARY, Question
from dropflow_lab.digits.data.scenes import COLORS, PATCHES, Scene, draw_scene, render

WORD_IDS = {word: i for i, word in enumerate(VOCABULARY)}
PREFIX = tuple(WORD_IDS[word] for word in ("<s>", "user", ":"))
"""The tokens before the picture."""
ROOM = 141
"""Tokens of questions per picture; with prefix and visual tokens, a row has 288, a multiple of 32, which is fast."""
IGNORED = -100
_COLOR_IDS = {color: i for i, color in enumerate(COLORS)}


@dataclass(frozen=True)
class PackedBatch:
    """Pictures, and the questions that follow each of them."""

    pixels: Float[Tensor, "batch 3 96 96"]
    owner: Int[Tensor, "batch 144"]
    """Item that covers each patch, -1 for background."""
    tokens: Int[Tensor, "batch length"]
    """The questions with their answers, one after the other; padding at the end."""
    labels: Int[Tensor, "batch length"]
    """The next token if it is part of an answer, else -100."""
    segment: Int[Tensor, "batch length"]
    """Which question of the row a token belongs to, -1 for padding."""
    offset: Int[Tensor, "batch length"]
    """Position of a token within its question."""
    needs: Bool[Tensor, "batch questions items"]
    """Items needed to answer each question."""
    kind: Int[Tensor, "batch questions"]
    """Index into `KINDS`, -1 for padding."""
    digit: Int[Tensor, "batch items"]
    """Class of each item, -100 for padding."""
    color: Int[Tensor, "batch items"]
    """Index into `COLORS`, -100 for padding."""


def draw_questions(scene: Scene, room: int, rng: np.random.Generator) -> list[Question]:
    """Draw different questions about the scene, kinds in the proportions of `MIX`, to fill `room` tokens."""
    chosen: list[Question] = []
    for question in shuffled(scene, rng):
        room -= len(_words(question))
        if room < 0:
            break
        chosen.append(question)
    return chosen


def _words(question: Question | ClipQuestion) -> list[str]:
    return [*question.text.split(), "assistant", ":", *question.answer.split(), "</s>"]


def draw_batch(
    split: str, seed: tuple[int, ...], size: int, room: int = ROOM, digits: tuple[int, int] = (3, 6)
) -> PackedBatch:
    """Draw the batch of (`split`, `seed`), with up to `room` tokens of questions per picture."""
    rng = np.random.default_rng([*seed, 7])
    scenes = [draw_scene(split, (*seed, row), digits) for row in range(size)]
    return pack(scenes, [draw_questions(scene, room, rng) for scene in scenes], room)


def pack(scenes: list[Scene], asked: list[list[Question]], length: int = 0) -> PackedBatch:
    """Lay out the questions of each scene after its picture, in rows of at least `length` tokens."""
    drawn = [render(scene) for scene in scenes]
    rows = [lay_out(questions, WORD_IDS) for questions in asked]
    length = max(length, *(row.shape[1] for row in rows))
    fill = np.asarray([[WORD_IDS["<pad>"]], [IGNORED], [-1], [0]])
    table = np.stack([np.concatenate([row, np.repeat(fill, length - row.shape[1], axis=1)], axis=1) for row in rows])
    most = max(len(questions) for questions in asked)
    needs, kind = np.zeros((len(scenes), most, 9), dtype=bool), np.full((len(scenes), most), -1)
    facts = np.full((2, len(scenes), 9), IGNORED)
    for row, (scene, questions) in enumerate(zip(scenes, asked, strict=True)):
        for column, question in enumerate(questions):
            needs[row, column, list(question.evidence)] = True
            kind[row, column] = KINDS.index(question.kind)
        facts[0, row, : len(scene.items)] = [item.digit for item in scene.items]
        facts[1, row, : len(scene.items)] = [_COLOR_IDS[item.color] for item in scene.items]
    tokens, labels, segment, offset = torch.from_numpy(table).unbind(1)
    return PackedBatch(
        pixels=normalize(np.stack([pixels for pixels, _ in drawn])),
        owner=torch.from_numpy(np.stack([owner for _, owner in drawn])),
        tokens=tokens,
        labels=labels,
        segment=segment,
        offset=offset,
        needs=torch.from_numpy(needs),
        kind=torch.from_numpy(kind),
        digit=torch.from_numpy(facts[0]),
        color=torch.from_numpy(facts[1]),
    )


def lay_out(questions: Sequence[Question | ClipQuestion], word_ids: Mapping[str, int]) -> Int[np.ndarray, "4 length"]:
    """Return tokens, labels, segment and offset of one row of questions."""
    columns: list[tuple[int, int, int, int]] = []
    for number, question in enumerate(questions):
        ids = [word_ids[word] for word in _words(question)]
        answer = len(ids) - len(question.answer.split()) - 1
        for place, (token, following) in enumerate(zip(ids, [*ids[1:], IGNORED], strict=True)):
            columns.append((token, following if place >= answer - 1 else IGNORED, number, place))
    return np.asarray(columns, dtype=np.int64).T


def normalize(pixels: np.ndarray) -> Float[Tensor, "batch 3 side side"]:
    """Return RGB pixels of 0..255, `(batch, side, side, 3)`, as the model takes them."""
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (scaled - mean) / std


def packed_mask(
    segment: Int[Tensor, "batch length"], visual: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "batch 1 total total"]:
    """Return the additive mask of packed rows: 0 for visible tokens, very low elsewhere."""
    return mask_after(segment, len(PREFIX) + visual, dtype)


def mask_after(
    segment: Int[Tensor, "batch length"], before: int, dtype: torch.dtype
) -> Float[Tensor, "batch 1 total total"]:
    """Return the additive mask of rows of questions after `before` tokens that all of them see."""
    causal = torch.ones(before + segment.shape[1], before + segment.shape[1], dtype=torch.bool).tril()
    seen = causal.repeat(segment.shape[0], 1, 1)  # (batch, total, total)
    seen[:, before:, before:] &= segment[:, :, None] == segment[:, None, :]
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min / 2)
    return mask[:, None]


def packed_positions(
    batch: PackedBatch, kept: Int[Tensor, "batch visual"] | None = None, *, compact: bool = False
) -> Int[Tensor, "batch total"]:
    """Return position ids: questions restart after the picture, kept visual tokens retain their positions.

    `compact` numbers the kept tokens without gaps instead.
    """
    rows, visual = batch.tokens.shape[0], PATCHES if kept is None else kept.shape[1]
    places = torch.arange(visual).expand(rows, -1) if kept is None or compact else kept
    start = len(PREFIX) + (visual if compact else PATCHES)
    prefix = torch.arange(len(PREFIX)).expand(rows, -1)
    return torch.cat([prefix, len(PREFIX) + places, start + batch.offset], dim=1)


def answerable(batch: PackedBatch, kept: Int[Tensor, "batch visual"]) -> Bool[Tensor, "batch questions"]:
    """Return which questions still have a kept patch of every digit that they need."""
    owner = batch.owner.gather(1, kept)
    seen = (owner[:, :, None] == torch.arange(batch.needs.shape[2])).any(1)  # (batch, items)
    return ~(batch.needs & ~seen[:, None]).any(-1) & (batch.kind >= 0)
