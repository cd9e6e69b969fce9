"""HiDrop's training rules: who asks, who is not pruned, and from where the first word of a caption is predicted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import HIDROP, policy, prompt, relative_error, tiny_llava
from training import Prompts, collate, freeze_tower
from watching import told, watched

import dropflow
from dropflow import operators
from dropflow.testing import MaskedOracle

IMAGE = 98
SAMPLES = (("I", 6), (3, "I", 9), ("I", 2, "I", 12), (8,), (2, "I", 5))
"""A caption, a dialogue, two images, no image, and a sample that will have no labels."""
KEEP_LAST = policy(
    **HIDROP["stages"] | {"exit": {"use": "hidrop/early-exit", "at": 5, "keep_last": True}},
)


def batch(side: str) -> dict[str, Any]:
    """The samples; every word of the caption is a label, and the dialogues end in three-token answers."""
    inputs = prompt(SAMPLES, side=side)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        own = mask.nonzero()[-6 if row == 0 else -3 :, 0]
        labels[row, own] = inputs["input_ids"][row, own]
    labels[-1] = -100
    return inputs | {"labels": labels}


@pytest.fixture(params=[None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = tiny_llava().train()
    if request.param is not None:
        with warnings.catch_warnings():  # transformers 5.23 renames the call, 5.20 knows only this name
            warnings.simplefilter("ignore", FutureWarning)
            made.gradient_checkpointing_enable({"use_reentrant": request.param})
        made.config.use_cache = made.get_decoder().config.use_cache = False
    yield made
    assert "layers" not in made.get_decoder().__dict__


@pytest.mark.parametrize("which", [HIDROP, KEEP_LAST], ids=["published", "keep last"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the frozen-free tower under reentrant
def test_loss_and_gradients_of_a_mixed_batch_equal_the_masked_run(model: Any, side: str, which: dict[str, Any]) -> None:
    inputs = batch(side)
    with dropflow.attach(model, which) as flow:
        loss = model(**inputs).loss
        live = flow.live()
        loss.backward()
    got = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    for module in model.modules():
        module.gradient_checkpointing = False
    with MaskedOracle(model, live):
        expected = model(**inputs, use_cache=False).loss
        expected.backward()
    visual = (live & (inputs["input_ids"] == IMAGE)).sum(2).tolist()
    left = [1, 0, 0, 0, 0] if which is KEEP_LAST else [0] * 5
    assert visual == [[0] * 5, [16, 16, 32, 0, 16], *[[7, 7, 14, 0, 16]] * 2, [2, 2, 4, 0, 16], left]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, weight in model.named_parameters():
        if weight.grad is not None and weight.grad.abs().max() > 1e-7:
            assert relative_error(got[name], weight.grad) < 1e-3, name


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_the_first_word_of_a_caption_is_predicted_from_bos_or_from_the_last_visual_token(side: str) -> None:
    model, inputs = tiny_llava(), batch(side)
    bos, last = (inputs["input_ids"][0] == IMAGE).nonzero()[[0, -1], 0] + torch.tensor([-1, 0])
    other = inputs | {"pixel_values": inputs["pixel_values"].clone()}
    other["pixel_values"][0] += 1.0  # another picture before the caption
    for which, blind in ((HIDROP, True), (KEEP_LAST, False)):
        with dropflow.attach(model, which) as flow:
            logits = model(**inputs).logits[0]
            live = flow.live()
            changed = model(**other).logits[0]
        assert torch.equal(logits[last], logits[bos]) is blind
        assert torch.equal(logits[last], changed[last]) is blind
        assert bool(live[-1, 0, last]) is not blind


@torch.no_grad()
def test_a_caption_is_generated_from_the_same_token_as_in_training() -> None:
    model, inputs = tiny_llava(), prompt([("I",), (1, "I")])
    with dropflow.attach(model, KEEP_LAST) as flow:
        logits = model(**inputs).logits[:, -1]
        live = flow.live()
        said = model.generate(**inputs, max_new_tokens=3, do_sample=False, min_new_tokens=3)
    assert live[-1, :, -1].all()
    with MaskedOracle(model, live):
        assert relative_error(logits, model(**inputs, use_cache=False).logits[:, -1]) < 1e-5
        expected = model.generate(**inputs, max_new_tokens=3, do_sample=False, min_new_tokens=3, use_cache=False)
    assert torch.equal(said, expected)


@torch.no_grad()
def test_a_dialogue_of_two_rounds_ranks_by_the_mean_of_both_questions() -> None:
    model, inputs = tiny_llava(), prompt([(3, "I", 12)])
    ids = inputs["input_ids"]
    rounds = []
    for spans in ([(23, 26)], [(29, 32)], [(23, 26), (29, 32)]):
        labels = torch.full_like(ids, -100)
        for start, end in spans:
            labels[:, start:end] = ids[:, start:end]
        rounds.append(labels)
    with dropflow.attach(model, watched(**HIDROP["stages"])) as flow:
        for labels in rounds:
            model(**inputs, labels=labels)
        first, second, both = (event.scores["pyramid"] for event in told(flow) if event.boundary == 2)
    assert relative_error(both, (first + second) / 2) < 1e-6
    assert relative_error(both, second) > 0.05


def test_steps_around_an_aborted_one_equal_fresh_steps() -> None:
    """Reference bug: a step that raised left its counts to the next one, on other images."""
    data = Prompts()
    batches = [collate([data[i] for i in rows]) for rows in ((0, 1, 2), (4, 5, 7), (3, 6))]
    curves = []
    for aborts in (False, True):
        model = freeze_tower(tiny_llava()).train()
        optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.05)
        layer = model.get_decoder()._modules["layers"][3]
        losses = []
        with dropflow.attach(model, HIDROP):
            for inputs in batches[::2]:
                loss = model(**inputs).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                if aborts:
                    handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("aborted")))
                    with pytest.raises(RuntimeError, match="aborted"):
                        model(**batches[1])
                    handle.remove()
        curves.append(losses)
    assert curves[0] == curves[1]


def test_scores_that_choose_the_same_tokens_give_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient comes from the hard selection: only the chosen set counts, not the scores (hidrop, test 11)."""
    made, inputs = tiny_llava().train(), batch("left")

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        made.zero_grad(set_to_none=True)
        with dropflow.attach(made, HIDROP) as flow:
            loss = made(**inputs).loss
            live = flow.live()
            loss.backward()
        grads = {name: weight.grad.clone() for name, weight in made.named_parameters() if weight.grad is not None}
        return loss.detach(), grads, live

    loss, grads, live = step()
    real = operators.instruction_scores
    monkeypatch.setattr(operators, "instruction_scores", lambda call: real(call) ** 3 * 7 + 1)
    again, others, same = step()
    assert torch.equal(live, same)
    assert torch.equal(loss, again)
    assert grads.keys() == others.keys()
    assert all(torch.equal(grads[name], others[name]) for name in grads)
    monkeypatch.setattr(operators, "instruction_scores", lambda call: -real(call))
    assert not torch.equal(step()[2], live)
