"""Loss and gradients under a policy equal those of the masked run."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tiny import HIDROP, RAGGED, policy, prompt, relative_error, tiny_llava

import dropflow
from dropflow.engine.tokens.prompt import VisualTokens, instruction_tokens, make_prompt
from dropflow.engine.tokens.row_flags import RowFlags
from dropflow.testing import MaskedOracle

SAMPLES = ((3, "I", 9), ("I", 2, "I", 12), (8,))


def labelled(side: str = "left") -> dict[str, Any]:
    """A batch whose last three tokens of every sample are the answer."""
    inputs = prompt(SAMPLES, side=side)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        answer = mask.nonzero()[-3:, 0]
        labels[row, answer] = inputs["input_ids"][row, answer]
    return inputs | {"labels": labels}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def enable_checkpointing(model: Any, reentrant: bool) -> None:
    with warnings.catch_warnings():  # transformers 5.23 renames the call, 5.20 knows only this name
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("which", [HIDROP, RAGGED], ids=["hidrop", "ragged"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the frozen-free tower under reentrant
def test_loss_and_every_gradient_equal_the_masked_run(
    attention: str, checkpointing: bool | None, side: str, which: dict[str, Any]
) -> None:
    model, inputs = tiny_llava(attention=attention).train(), labelled(side)
    if checkpointing is not None:
        enable_checkpointing(model, checkpointing)
        model.config.use_cache = model.get_decoder().config.use_cache = False
    with dropflow.attach(model, which) as flow:
        loss = model(**inputs).loss
        live = flow.live()
        loss.backward()  # outside the forward: a recomputed layer must not meet the policy again
    got = gradients(model)
    for module in model.modules():
        module.gradient_checkpointing = False
    with MaskedOracle(model, live):
        expected_loss = model(**inputs, use_cache=False).loss
        expected_loss.backward()
    expected = gradients(model)
    assert not live.all()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        if scale > 1e-7:
            assert (got[name] - gradient).abs().max() / scale < 1e-3, name
    assert got["model.multi_modal_projector.linear_1.weight"].abs().max() > 0


def test_logits_given_with_labels_are_those_given_without(llava: Any) -> None:
    inputs = labelled()
    labels = inputs.pop("labels")
    # the same instruction tokens are asked: labels move the query, so one round at the very end is compared
    labels[:, :-1] = -100
    inputs["input_ids"], mask = inputs["input_ids"][:, :-1], inputs["attention_mask"][:, :-1]
    labels = torch.full_like(inputs["input_ids"], -100)
    pyramid = policy(exit={"use": "hidrop/early-exit", "at": 3})
    with torch.no_grad(), dropflow.attach(llava, pyramid):
        inputs["attention_mask"] = mask
        plain = llava(**inputs).logits
        labels[:, -1] = inputs["input_ids"][:, -1]
        both = llava(**inputs, labels=labels).logits
        as_tuple = llava(**inputs, labels=labels, return_dict=False)
    assert relative_error(both, plain) < 1e-6
    assert torch.equal(as_tuple[1], both)
    assert as_tuple[0].dim() == 0


def test_instruction_tokens_are_the_last_of_every_round() -> None:
    valid = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]] * 3, dtype=torch.bool)
    labels = torch.tensor([[-100, -100, -100, 5, 6, -100, 7, 8], [-100] * 8, [-100] * 7 + [4]])
    index, counts = instruction_tokens(valid, labels, 0)
    asked = [
        sorted(i for i, c in zip(row, real, strict=True) if c)
        for row, real in zip(index.tolist(), counts.tolist(), strict=True)
    ]
    assert asked == [[2, 5], [], [6]]
    last, real = instruction_tokens(valid, None, 0)
    assert last.tolist() == [[7], [7], [7]]
    assert real.all()


def test_images_are_numbered_through_the_batch_and_measured_one_by_one() -> None:
    visual = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 1]], dtype=torch.bool)
    valid = torch.ones_like(visual)
    asks = instruction_tokens(valid, None, 0)
    runs = make_prompt(VisualTokens(visual, {}), None, valid, asks, None)
    assert runs.image_id.tolist() == [[0, 0, -1, 1, -1, -1], [-1] * 6, [-1, 2, 2, 2, -1, 3]]
    assert runs.image_sizes == (2, 1, 3, 1)
    pairs = make_prompt(VisualTokens(visual[2:], {}), None, valid[2:], (asks[0][2:], asks[1][2:]), 2)
    assert pairs.image_id.tolist() == [[-1, 0, 0, 1, -1, 1]]
    kept, protected = torch.tensor([1, 0, 1, 1, 1, 0, 1]) > 0, torch.tensor([0, 0, 1, 0, 0, 0, 0]) > 0
    image, none = torch.tensor([0, 0, 1, 2, 2, 2, 3]), torch.zeros(7, dtype=torch.long)
    carried, tower = torch.zeros(7, 0), torch.ones(7)
    flags = RowFlags(kept, protected, image, none, none > 0, carried, tower, none - 1, image, images=4, lines=0, plan=0)
    found = VisualTokens.found({"image": visual})
    assert found is not None
    encoded = make_prompt(found, found.rows({"image": flags}), valid, asks, None)
    assert encoded.image_sizes == (1, 1, 2, 1)
    assert encoded.protected.nonzero().tolist() == [[0, 3]]
    assert (~encoded.present).nonzero().tolist() == [[0, 1], [2, 3]]


def test_a_sample_without_labels_is_not_pruned() -> None:
    model, inputs = tiny_llava(), labelled()
    inputs["labels"][0] = -100
    with torch.no_grad(), dropflow.attach(model, RAGGED) as flow:
        model(**inputs)
        visual = flow.live() & (inputs["input_ids"] == 98)
    assert visual[-1].sum(1).tolist() == [16, 4, 0]


def test_a_dropped_token_gets_gradient_from_the_layers_it_lived_in() -> None:
    model, inputs = tiny_llava().train(), labelled()
    features = {}

    def keep(_: Any, __: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        features["projected"] = output

    model.model.multi_modal_projector.register_forward_hook(keep)
    for entry, expects in ((1, True), (2, False)):
        which = policy(
            inject={"use": "hidrop/late-injection", "at": entry},
            pyramid={"use": "hidrop/concave-pyramid", "keep": {2: 3}},
        )
        with dropflow.attach(model, which) as flow:
            model(**inputs).loss.backward()
            live = flow.live()[:, 0]
        dropped = ~live[2][inputs["input_ids"][0] == 98]
        received = features["projected"].grad[0].abs().sum(1) > 0
        assert dropped.sum() == 13
        assert bool(received[dropped].any()) is expects
        assert received[~dropped].all()
        model.zero_grad(set_to_none=True)


def test_an_aborted_step_changes_nothing() -> None:
    model, inputs = tiny_llava().train(), labelled()
    with dropflow.attach(model, HIDROP):
        first = model(**inputs).loss
        layer = model.get_decoder()._modules["layers"][3]
        handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("aborted")))
        with pytest.raises(RuntimeError, match="aborted"):
            model(**labelled("right"))
        handle.remove()
        again = model(**inputs).loss
    assert torch.equal(first, again)
