"""Dialogues as training inputs: rounds that share a picture and nothing else, with labels on the answers only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import dropflow
from dropflow_lab.compare.digits_accuracy import build_inputs
from dropflow_lab.digits.checkpoints.model import build_model, build_processor
from dropflow_lab.digits.data.dataset import Example
from dropflow_lab.digits.data.dialogues import Dialogue, Dialogues
from dropflow_lab.errors import InputError
from dropflow_lab.finetune import Collator


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def _spans(labels) -> list[list[int]]:
    """Labelled tokens, in one list per run of neighbours."""
    spans: list[list[int]] = []
    for place, label in enumerate(labels.tolist()):
        if label != -100:
            if place == 0 or labels[place - 1] == -100:
                spans.append([])
            spans[-1].append(label)
    return spans


def test_labels_are_the_answers_and_their_ends(processor) -> None:
    data = Dialogues(3, rounds=2, seed=1)
    batch = Collator(processor)([data[index] for index in range(3)])
    for index in range(3):
        said = [processor.tokenizer.decode(span) for span in _spans(batch["labels"][index])]
        assert said == [f"{answer} </s>" for _, answer in data[index].rounds]
    labelled = batch["labels"] != -100
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])


def test_the_prompt_is_the_one_that_is_asked_at_inference(processor) -> None:
    dialogue = Dialogues(1, seed=2)[0]
    (question, answer), *_ = dialogue.rounds
    batch = Collator(processor)([dialogue])
    asked = build_inputs(processor, [Example(dialogue.images[0], question, answer, "pos")])
    first = int((batch["labels"][0] != -100).nonzero()[0])
    assert torch.equal(batch["input_ids"][0, :first], asked["input_ids"][0])
    assert torch.equal(batch["pixel_values"], asked["pixel_values"])


def _losses(model, batch: dict[str, Any]) -> Tensor:
    """The loss of every labelled token."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")


@torch.no_grad()
@pytest.mark.parametrize("window", [{}, {"inject": 1}, {"inject": 1, "exit": 3}])
def test_rounds_of_a_sample_are_learnt_as_if_each_were_asked_alone(processor, window) -> None:
    model = build_model(3, decoder_layers=4).eval()
    uses = {"inject": "hidrop/late-injection", "exit": "hidrop/early-exit"}
    stages = {name: {"use": uses[name], "at": at} for name, at in window.items()}
    data, collate = Dialogues(3, rounds=4, seed=6), Collator(processor)
    dialogues = [data[index] for index in range(3)]
    alone = [collate([Dialogue(d.images, (one,))]) for d in dialogues for one in d.rounds]
    with dropflow.attach(model, {"stages": stages}):
        expected = torch.cat([_losses(model, batch) for batch in alone])
        torch.testing.assert_close(_losses(model, collate(dialogues)), expected, atol=2e-5, rtol=2e-5)


def test_every_round_asks(processor) -> None:
    data, seen = Dialogues(2, rounds=3, seed=8), []

    class Watch(dropflow.Stage[dropflow.StageOptions]):
        Options = dropflow.StageOptions
        prune_at = (1,)

        @dropflow.hookimpl
        def prune(self, call: dropflow.PruneCall) -> None:
            seen.append((call.instruction_slots.shape[1], bool(call.instruction_valid.all())))

    model = build_model(3, decoder_layers=2).train()
    with dropflow.attach(model, {"stages": {"watch": {"use": Watch}}}):
        model(**Collator(processor)([data[0], data[1]]))
    assert seen == [(3, True)]


def test_padding_is_on_the_right(processor) -> None:
    data = Dialogues(8, seed=3)
    mask = Collator(processor)([data[index] for index in range(8)])["attention_mask"]
    assert bool(mask[:, 0].all())
    assert not bool(mask.all())


def test_samples_depend_on_seed_and_index_alone() -> None:
    data, longer, other = Dialogues(2, seed=4), Dialogues(9, seed=4), Dialogues(2, seed=5)
    assert (data[1].rounds, data[1].images[0].tobytes()) == (longer[1].rounds, longer[1].images[0].tobytes())
    assert data[1].images[0].tobytes() != other[1].images[0].tobytes()
    assert len({question for question, _ in Dialogues(1, rounds=6)[0].rounds}) == 6


def test_bad_arguments_are_refused(processor) -> None:
    with pytest.raises(ValueError, match="round"):
        Dialogues(1, rounds=0)
    with pytest.raises(IndexError, match="got 2"):
        Dialogues(2)[2]
    with pytest.raises(ValueError, match="split"):
        Dialogues(1, split="tset")
    saved, processor.chat_template = processor.chat_template, None
    try:
        with pytest.raises(InputError, match="chat template"):
            Collator(processor)
    finally:
        processor.chat_template = saved


def test_a_template_that_rewrites_the_prompt_is_refused(processor) -> None:
    saved = processor.chat_template
    processor.chat_template = "{{ ' read' if not add_generation_prompt else '' }}" + saved
    data = Dialogues(1, rounds=2)
    try:
        with pytest.raises(InputError, match="the answer cannot be located"):
            Collator(processor)([data[0]])
    finally:
        processor.chat_template = saved
