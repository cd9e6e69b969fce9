"""The embedded model answers questions about one picture word for word the same, asked anew and with a prefix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dropflow
from dropflow_lab.digits.checkpoints.model import load
from dropflow_lab.digits.data.dialogues import Dialogues
from dropflow_lab.inputs.prompts import build_inputs

QUESTIONS = 10
POLICIES: dict[str, tuple[str, Any]] = {
    "hidrop-digits": ("hidrop", "hidrop-digits"),
    "mustdrop-digits": ("dense", "mustdrop-digits"),
    "fastv": ("dense", {"name": "fastv", "stages": {"rank": {"use": "fastv/attention-rank", "at": 2, "keep": 72}}}),
    "encodes": ("dense", {"name": "encodes", "stages": {"few": {"use": "divprune/max-min", "keep": 56}}}),
}
"""Checkpoints and policies: one prunes late, one merges, filters and evicts, one prunes early, one only encodes."""


def _answers(model: Any, processor: Any, inputs: Any) -> list[list[int]]:
    found = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert processor.tokenizer.pad_token_id == 0
    return [[token for token in row.tolist() if token] for row in found[:, inputs["input_ids"].shape[1] :]]


def _differences(which: str, pictures: int) -> tuple[int, int]:
    """The number of answers, and how many of them differ."""
    checkpoint, policy = POLICIES[which]
    model, processor = load(checkpoint)
    asked = differ = 0
    with dropflow.attach(model, policy) as flow, torch.no_grad():
        dialogues = Dialogues(pictures, rounds=QUESTIONS, split="test")
        for dialogue in map(dialogues.__getitem__, range(pictures)):
            questions = [question for question, _ in dialogue.rounds]
            inputs = build_inputs(processor, [(dialogue.images, question) for question in questions])
            prefix = flow.prefix(**build_inputs(processor, [(dialogue.images, questions[0])]))
            anew = _answers(model, processor, inputs)
            again = _answers(model, processor, prefix.inputs(**inputs))
            asked += len(anew)
            differ += sum(one != other for one, other in zip(anew, again, strict=True))
    return asked, differ


@pytest.mark.parametrize("which", POLICIES)
def test_a_few_answers_do_not_differ(which: str) -> None:
    assert _differences(which, 2) == (20, 0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("which", POLICIES)
def test_a_thousand_answers_do_not_differ(which: str) -> None:
    asked, differ = _differences(which, 110)
    assert (asked >= 1000, differ) == (True, 0)
