"""Training batches of conversations: several of two or three questions after one picture, in one row.

A row is `<s> user : [visual tokens] question answer user : question answer ... question answer user : ...`. As in
`packing`, position ids restart after the picture, and the mask is block-diagonal there: here for each conversation, in
which a question sees the picture, the earlier questions and their answers, but no other conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from dropflow_lab.digits.data.dialogues import rounds_at
from dropflow_lab.digits.data.mix import shuffled
from dropflow_lab.digits.data.questions import Question
from dropflow_lab.digits.data.scenes import PATCHES, Scene, draw_scene, render
from dropflow_lab.digits.training.packing import IGNORED, PREFIX, ROOM, WORD_IDS, lay_out, normalize, packed_mask

TURNS = (2, 3)
"""Fewest and most questions of a conversation."""
NEXT = tuple(WORD_IDS[word] for word in ("user", ":"))
"""The tokens before every question but the first, whose are those before the picture."""
Conversation = Sequence[Question]
"""Questions about one picture, asked one after the other."""


@dataclass(frozen=True)
class ConversationBatch:
    """Pictures, and the conversations that follow each of them."""

    pixels: Float[Tensor, "batch 3 96 96"]
    tokens: Int[Tensor, "batch length"]
    """The conversations with the right answers, one after the other; padding at the end."""
    labels: Int[Tensor, "batch length"]
    """The next token if it is part of an answer, else -100."""
    segment: Int[Tensor, "batch length"]
    """Which conversation of the row a token belongs to, -1 for padding."""
    offset: Int[Tensor, "batch length"]
    """Position of a token within its conversation."""
    question: Int[Tensor, "batch length"]
    """Which question of the row a token belongs to, -1 for padding."""
    turn: Int[Tensor, "batch questions"]
    """In which turn a question is asked, from 0; -1 for padding."""


def draw_conversations(split: str, seed: tuple[int, ...], size: int, room: int = ROOM) -> ConversationBatch:
    """Draw the batch of (`split`, `seed`), with up to `room` tokens of conversations after each picture.

    No question is asked twice about a picture; kinds come in the proportions of `MIX`.
    """
    rng = np.random.default_rng([*seed, 11])
    scenes = [draw_scene(split, (*seed, row)) for row in range(size)]
    return pack_conversations(scenes, [list(_conversations(scene, room, rng)) for scene in scenes], room)


def _conversations(scene: Scene, room: int, rng: np.random.Generator) -> Iterator[Conversation]:
    questions = shuffled(scene, rng)
    while True:
        turns = int(rng.integers(TURNS[0], TURNS[1] + 1))
        one = [question for question, _ in zip(questions, range(turns), strict=False)]
        room -= _lay_out([one]).shape[1] if one else 0
        if len(one) < turns or room < 0:
            return
        yield one


@cache
def validation_conversations(count: int) -> tuple[ConversationBatch, ...]:
    """Return the `count` fixed validation conversations of three questions, one about each picture."""
    drawn = [rounds_at("validation", index, TURNS[1]) for index in range(count)]
    parts = [drawn[first : first + 50] for first in range(0, count, 50)]
    return tuple(pack_conversations([scene for scene, _ in part], [[asked] for _, asked in part]) for part in parts)


def pack_conversations(
    scenes: Sequence[Scene], asked: Sequence[Sequence[Conversation]], length: int = 0
) -> ConversationBatch:
    """Lay out the conversations about each scene after its picture, in rows of at least `length` tokens."""
    rows = [_lay_out(conversations) for conversations in asked]
    length = max(length, *(row.shape[1] for row in rows))
    fill = np.asarray([[WORD_IDS["<pad>"]], [IGNORED], [-1], [0], [-1]])
    table = np.stack([np.concatenate([row, np.repeat(fill, length - row.shape[1], axis=1)], axis=1) for row in rows])
    turns = [[turn for one in conversations for turn in range(len(one))] for conversations in asked]
    turn = np.full((len(scenes), max(map(len, turns))), -1)
    for row, numbers in enumerate(turns):
        turn[row, : len(numbers)] = numbers
    pixels = normalize(np.stack([render(scene)[0] for scene in scenes]))
    tokens, labels, segment, offset, question = torch.from_numpy(table).unbind(1)
    return ConversationBatch(pixels, tokens, labels, segment, offset, question, torch.from_numpy(turn))


def _lay_out(conversations: Sequence[Conversation]) -> Int[np.ndarray, "5 length"]:
    """Return tokens, labels, segment, offset and question of one row."""
    parts: list[np.ndarray] = []
    question = 0
    for segment, conversation in enumerate(conversations):
        offset = 0
        for turn, one in enumerate(conversation):
            tokens, labels, _, _ = lay_out([one], WORD_IDS)
            if turn:
                tokens, labels = np.append(NEXT, tokens), np.append([IGNORED] * len(NEXT), labels)
            size = len(tokens)
            places = np.arange(offset, offset + size)
            parts.append(np.stack([tokens, labels, np.full(size, segment), places, np.full(size, question)]))
            offset, question = offset + size, question + 1
    return np.concatenate(parts, axis=1)


def conversation_losses(
    model: LlavaForConditionalGeneration, batch: ConversationBatch
) -> tuple[Float[Tensor, " answers"], Tensor]:
    """Return the loss of every answer token, and which questions are answered correctly, `(batch, questions)`.

    A question is answered correctly where the most likely token is right at every position of its answer, after the
    right answers to the questions before it.
    """
    embed, size, before = model.get_input_embeddings(), len(batch.tokens), len(PREFIX) + PATCHES
    with torch.no_grad():
        features = model.model.vision_tower(batch.pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    visual = model.model.multi_modal_projector(features)
    prefix = embed(torch.tensor(PREFIX)).expand(size, -1, -1).to(visual.dtype)
    states = model.model.language_model(
        inputs_embeds=torch.cat([prefix, visual, embed(batch.tokens).to(visual.dtype)], dim=1),
        attention_mask=packed_mask(batch.segment, PATCHES, visual.dtype),
        position_ids=torch.cat([torch.arange(before).expand(size, -1), before + batch.offset], dim=1),
        use_cache=False,
        prefix_length=before,
    ).last_hidden_state
    scored = batch.labels != IGNORED
    logits, labels = model.lm_head(states[:, before:][scored]).float(), batch.labels[scored]
    wrong = torch.zeros(batch.turn.shape)
    row = torch.arange(size)[:, None].expand_as(batch.segment)[scored]
    wrong.index_put_((row, batch.question[scored]), (logits.argmax(-1) != labels).float(), accumulate=True)
    return functional.cross_entropy(logits, labels, reduction="none"), wrong == 0
