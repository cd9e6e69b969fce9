"""Training batches of clips: many independent questions after one video, in one row.

A row is `<s> user : frame 1 [visual tokens] frame 2 [visual tokens] ... question answer question answer ...`, with
positions and a mask as in `packing`: every question sees only the video and itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dropflow_lab.digits.data.clip_questions import CLIP_KINDS, CLIP_WORDS, ClipQuestion, ask_clip
from dropflow_lab.digits.data.clips import FRAMES, SIDE, Clip, draw_clip, render_clip
from dropflow_lab.digits.data.scenes import PATCH
from dropflow_lab.digits.training.packing import IGNORED, lay_out, normalize

CLIP_WORD_IDS = {word: i for i, word in enumerate(CLIP_WORDS)}
ROWS_PER_FRAME = (SIDE // PATCH) ** 2
"""Visual tokens of a frame."""
_PER_KIND = {"c2d": 1, "d2c": 1, "exist": 1, "frame": 2, "where": 2, "first": 2, "last": 2, "count": 2, "total": 1}
"""Questions of each kind about a clip, as far as it has them."""


@dataclass(frozen=True)
class ClipBatch:
    """Clips, and the questions that follow each of them; fields as those of `packing.PackedBatch`."""

    pixels: Float[Tensor, "frames 3 48 48"]
    """Frames of the first clip, then of the second one, and so on."""
    tokens: Int[Tensor, "batch length"]
    labels: Int[Tensor, "batch length"]
    segment: Int[Tensor, "batch length"]
    offset: Int[Tensor, "batch length"]
    kind: Int[Tensor, "batch questions"]
    """Index into `CLIP_KINDS`, -1 for padding."""


def prefix_ids() -> Int[Tensor, "length"]:
    """Return the ids of all that precedes the questions, visual tokens as placeholders."""
    words = ["<s>", "user", ":"]
    for frame in range(FRAMES):
        words += ["frame", str(frame + 1), *["<image>"] * ROWS_PER_FRAME]
    return torch.tensor([CLIP_WORD_IDS[word] for word in words])


def draw_clips(split: str, seed: tuple[int, ...], size: int) -> ClipBatch:
    """Draw the batch of (`split`, `seed`), with about 13 questions about each clip."""
    rng = np.random.default_rng([*seed, 10])
    clips = [draw_clip(split, (*seed, row)) for row in range(size)]
    return pack_clips(clips, [_draw_questions(clip, rng) for clip in clips])


def _draw_questions(clip: Clip, rng: np.random.Generator) -> list[ClipQuestion]:
    chosen: list[ClipQuestion] = []
    for kind, asked in ask_clip(clip).items():
        if kind == "exist":
            wanted = ("yes", "no")[int(rng.integers(2))]
            asked = [question for question in asked if question.answer == wanted]
        order = rng.permutation(len(asked))[: _PER_KIND[kind]]
        chosen += [asked[int(place)] for place in order]
    return chosen


def pack_clips(clips: list[Clip], asked: list[list[ClipQuestion]]) -> ClipBatch:
    """Lay out the questions about each clip after it, in rows padded to a multiple of 32."""
    rows = [lay_out(questions, CLIP_WORD_IDS) for questions in asked]
    before = len(prefix_ids())
    length = -(-(before + max(row.shape[1] for row in rows)) // 32) * 32 - before
    fill = np.asarray([[CLIP_WORD_IDS["<pad>"]], [IGNORED], [-1], [0]])
    table = np.stack([np.concatenate([row, np.repeat(fill, length - row.shape[1], axis=1)], axis=1) for row in rows])
    kind = np.full((len(clips), max(map(len, asked))), -1)
    for row, questions in enumerate(asked):
        kind[row, : len(questions)] = [CLIP_KINDS.index(question.kind) for question in questions]
    tokens, labels, segment, offset = torch.from_numpy(table).unbind(1)
    pixels = normalize(np.concatenate([render_clip(clip) for clip in clips]))
    return ClipBatch(pixels, tokens, labels, segment, offset, torch.from_numpy(kind))
