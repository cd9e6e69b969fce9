"""Conversations: the packed rows are those of the prompts that `bench recall` asks, and the model answers them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional

from dropflow_lab.digits.checkpoints.changes import (
    CONVERSATIONS,
    load_conversations,
    shipped_change,
    start_conversations,
)
from dropflow_lab.digits.checkpoints.model import build_processor, load
from dropflow_lab.digits.data.dialogues import Dialogues, rounds_at
from dropflow_lab.digits.data.questions import Question
from dropflow_lab.digits.data.scenes import PATCHES, Scene, render
from dropflow_lab.digits.training.packed_conversations import (
    TURNS,
    conversation_losses,
    draw_conversations,
    pack_conversations,
    validation_conversations,
)
from dropflow_lab.digits.training.packing import IGNORED, PREFIX, WORD_IDS, packed_mask
from dropflow_lab.digits.training.train_change import train_change
from dropflow_lab.digits.training.train_conversations import CHANGE, RECIPE
from dropflow_lab.inputs.models import load_model
from dropflow_lab.inputs.prompts import build_conversations


def messages(scene: Scene, asked: list[Question]) -> list[dict[str, Any]]:
    """The messages of a conversation, the last answer left out; the picture comes with the first question."""
    said: list[dict[str, Any]] = []
    for question in asked:
        said.append({"role": "user", "content": [{"type": "text", "text": question.text}]})
        said.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    said[0]["content"].insert(0, {"type": "image", "image": Image.fromarray(render(scene)[0])})
    return said[:-1]


@torch.no_grad()
def test_a_packed_row_is_the_prompt_of_every_turn() -> None:
    """The ids are those of the chat template, and the losses those of each turn's prompt alone."""
    scene, asked = rounds_at("validation", 4, 5)
    talks = [asked[:3], asked[3:]]
    batch = pack_conversations([scene], [talks])
    model, processor = start_conversations(), build_processor()
    expected = []
    for number, talk in enumerate(talks):
        own = batch.tokens[0][batch.segment[0] == number]
        row = torch.cat((torch.tensor(PREFIX), torch.full((PATCHES,), WORD_IDS["<image>"]), own)).tolist()
        for turn, question in enumerate(talk):
            inputs = build_conversations(processor, [messages(scene, talk[: turn + 1])])
            length, answer = inputs["input_ids"].shape[1], processor.tokenizer.encode(f"{question.answer} </s>")
            assert row[: length + len(answer)] == [*inputs["input_ids"][0].tolist(), *answer]
            assert torch.allclose(inputs["pixel_values"], batch.pixels, atol=1e-5)
            ids = torch.cat((inputs["input_ids"], torch.tensor([answer])), dim=1)
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, length - 1 : -1]
            expected.append(functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    got, right = conversation_losses(model, batch)
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert right.shape == batch.turn.shape == (1, 5)
    assert batch.turn.tolist() == [[0, 1, 2, 0, 1]]


def test_a_conversation_sees_the_picture_and_itself() -> None:
    batch = draw_conversations("train", (0, 0), 1)
    mask = packed_mask(batch.segment, 1)[0, 0] == 0
    before = len(PREFIX) + 1
    second = (batch.segment[0] == 1).nonzero()[:, 0]
    seen = mask[before + int(second[-1])].nonzero()[:, 0].tolist()
    assert seen == [*range(before), *(before + second).tolist()]
    assert batch.offset[0][second].tolist() == list(range(len(second)))


@pytest.mark.parametrize("seed", range(5))
def test_drawn_conversations_have_two_or_three_questions_and_ask_nothing_twice(seed: int) -> None:
    batch = draw_conversations("train", (seed, 1), 4, room=150)
    assert batch.tokens.shape == (4, 150)
    for row in range(4):
        segment, question = batch.segment[row], batch.question[row]
        sizes = [len(question[segment == number].unique()) for number in range(int(segment.max()) + 1)]
        assert set(sizes) <= set(range(TURNS[0], TURNS[1] + 1))
        shown = batch.turn[row][batch.turn[row] >= 0].tolist()
        assert shown == [turn for size in sizes for turn in range(size)]
        texts = [tuple(batch.tokens[row][question == number].tolist()) for number in range(len(shown))]
        texts = [text[2:] if text[0] == WORD_IDS["user"] else text for text in texts]
        assert len(set(texts)) == len(texts)
        assert ((segment < 0) == (batch.labels[row] == IGNORED) & (question < 0)).all()


def test_validation_asks_the_dialogues_of_that_split() -> None:
    (batch,) = validation_conversations(2)
    rounds = Dialogues(2, rounds=3, split="validation")[1].rounds
    said = " user : ".join(f"{question} assistant : {answer} </s>" for question, answer in rounds)
    own = batch.tokens[1][batch.segment[1] == 0].tolist()
    assert own == [WORD_IDS[word] for word in said.split()]


def test_training_changes_projector_and_language_model_alone(tmp_path) -> None:
    recipe = replace(RECIPE, steps=2, schedule=2, batch=1, validate_every=2, validation=4)
    out = train_change(tmp_path, CHANGE, recipe=recipe, save_seconds=0, test=lambda model, _: f"{model.dtype}")
    assert (out / "test.json").read_text() == "torch.float32\n"
    path = out / "change.safetensors"
    model, _ = load_conversations(path)
    dense = load("dense")[0].state_dict()
    changed = [name for name, weight in model.state_dict().items() if not torch.equal(weight, dense[name])]
    assert any("layers.11.mlp" in name for name in changed)
    assert any("layers.0.self_attn" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)
    assert path.stat().st_size == shipped_change(CONVERSATIONS).stat().st_size < 300_000
    with pytest.raises(FileExistsError, match="holds a training run already"):
        train_change(tmp_path, CHANGE, recipe=recipe)


@torch.no_grad()
def test_the_shipped_model_answers_later_questions_as_first_ones() -> None:
    """Of 40 each, after right answers: 40, 36 and 36 when it was made; `dense` answers 39, 31 and 29."""
    model, _ = load_model(Path(CONVERSATIONS))
    drawn = [rounds_at("test", index, 3, seed=7) for index in range(40)]
    batch = pack_conversations([scene for scene, _ in drawn], [[asked] for _, asked in drawn])
    first, second, third = conversation_losses(model, batch)[1].sum(0).tolist()
    assert first >= 38
    assert second >= 34
    assert third >= 33
