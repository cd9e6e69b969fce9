"""The model's own forward decides about its loss, whatever a policy drops."""

from __future__ import annotations

from functools import wraps
from typing import Any

import pytest
import torch
from test_training import gradients, labelled
from tiny import HIDROP, RAGGED, relative_error, tiny_llava
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import dropflow
from dropflow.errors import UnsupportedModel
from dropflow.testing import MaskedOracle, tiny_models
from dropflow.testing.probes import EVERYTHING
from dropflow.testing.probes import RAGGED as RAGGED_STAGES


class WithATerm(LlavaForConditionalGeneration):
    """Adds a term of its own to the loss."""

    def forward(self, **arguments: Any) -> Any:
        output = super().forward(**arguments)
        output["loss"] = output.loss + 1000
        return output


class Fused(LlavaForConditionalGeneration):
    """Computes the loss from hidden states and the head's weight, without logits, as fused kernels do."""

    def forward(self, labels: Tensor | None = None, **arguments: Any) -> Any:
        hidden = self.model(**arguments).last_hidden_state[:, :-1]
        logits = torch.nn.functional.linear(hidden, self.lm_head.weight)
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())}


def model_of(kind: type[Any]) -> Any:
    model = tiny_llava().train()
    model.__class__ = kind
    return model


def loss_of(output: Any) -> Tensor:
    return output["loss"]


KINDS = {"plain": LlavaForConditionalGeneration, "a term of its own": WithATerm, "fused": Fused}


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_keeps_everything_gives_equal_bits(kind: str) -> None:
    model, inputs = model_of(KINDS[kind]), labelled()
    plain = loss_of(model(**inputs))
    plain.backward()
    expected = gradients(model)
    with dropflow.attach(model, EVERYTHING):
        flowing = loss_of(model(**inputs))
        flowing.backward()
    assert torch.equal(flowing, plain)
    assert all(torch.equal(got, expected[name]) for name, got in gradients(model).items())


@pytest.mark.parametrize("which", [HIDROP, RAGGED], ids=["hidrop", "ragged"])
@pytest.mark.parametrize("kind", KINDS)
def test_under_a_policy_the_loss_is_the_masked_runs(kind: str, which: dict[str, Any]) -> None:
    model, inputs = model_of(KINDS[kind]), labelled()
    with dropflow.attach(model, which) as flow:
        loss = loss_of(model(**inputs))
        loss.backward()
        live = flow.live()
    got = gradients(model)
    with MaskedOracle(model, live):
        expected = loss_of(model(**inputs, use_cache=False))
        expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in gradients(model).items():
        if gradient.abs().max() > 1e-6:
            assert relative_error(got[name], gradient) < 1e-3, name


@pytest.mark.parametrize("training", [True, False])
def test_logits_beside_labels_are_those_of_every_position(training: bool) -> None:
    model, inputs = tiny_llava().train(training), labelled()
    with torch.no_grad(), dropflow.attach(model, HIDROP) as flow:
        logits, live = model(**inputs).logits, flow.live()
    assert logits.shape == (*inputs["input_ids"].shape, 99)
    with torch.no_grad(), MaskedOracle(model, live):
        expected = model(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    assert relative_error(logits[real], expected[real]) < 1e-5


@pytest.mark.parametrize("kind", ["plain", "a term of its own"])
def test_labelled_logits_give_the_same_loss_and_gradients(kind: str) -> None:
    model, inputs = model_of(KINDS[kind]), labelled()
    found = []
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    for logits in ("all", "labelled"):
        with dropflow.attach(model, HIDROP, logits=logits):
            output = model(**inputs)
            output.loss.backward()
        found.append((output.loss.item(), gradients(model)))
    (whole, expected), (loss, got) = found
    asked = int((inputs["labels"] != -100).sum())
    assert rows == [inputs["input_ids"].numel(), asked]
    assert output.logits.shape == (1, asked, 99)
    assert loss == pytest.approx(whole, rel=1e-6)
    assert all(relative_error(got[name], own) < 1e-4 for name, own in expected.items() if own.abs().max() > 1e-6)
    assert "_loss_function" not in model.__dict__


@pytest.mark.parametrize("family", ["gemma3n", "gemma4", "gemma4_unified"])
def test_labelled_logits_where_the_loss_function_is_called_by_place(family: str) -> None:
    adapter, tiny = tiny_models()[family]
    model, inputs = tiny.model().train(), tiny.prompt()[0]
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"].cumsum(1) < 15, -100)
    losses = []
    for logits in ("all", "labelled"):
        with dropflow.attach(model, RAGGED_STAGES, adapter=adapter, logits=logits):
            losses.append(model(**inputs, labels=labels).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_loss_function_that_is_set_while_attached_is_called() -> None:
    model, inputs = tiny_llava().train(), labelled()
    with dropflow.attach(model, HIDROP, logits="labelled"):
        model(**inputs)
        model.loss_function = lambda logits, **_: logits.sum() * 0 + 5
        assert model(**inputs).loss == 5
    assert model(**inputs).loss == 5


def test_labelled_logits_in_evaluation_are_those_of_every_position(llava: Any) -> None:
    with torch.no_grad(), dropflow.attach(llava, HIDROP, logits="labelled"):
        assert llava(**labelled()).logits.shape[:2] == labelled()["input_ids"].shape


def test_an_aborted_forward_leaves_the_loss_function_as_it_was() -> None:
    model, inputs = tiny_llava().train(), labelled()

    def fail(*_: Any) -> None:
        raise RuntimeError("aborted")

    with dropflow.attach(model, HIDROP, logits="labelled"):
        whole = model(**inputs).loss
        handle = model.lm_head.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="aborted"):
            model(**inputs)
        handle.remove()
        assert torch.equal(model(**inputs).loss, whole)
    assert "_loss_function" not in model.__dict__


def test_a_loss_function_of_the_users_is_called_and_comes_back() -> None:
    model, inputs = tiny_llava().train(), labelled()
    seen = []

    def own(logits: Tensor, labels: Tensor | None, vocab_size: int, **more: Any) -> Tensor:  # noqa: ARG001
        seen.append((tuple(logits.shape), sorted(more)))
        return logits.sum() * 0 + vocab_size

    model.loss_function = own
    for logits in ("all", "labelled"):
        with dropflow.attach(model, HIDROP, logits=logits):
            assert model(**inputs, num_items_in_batch=7).loss == 99
    asked = int((inputs["labels"] != -100).sum())
    assert seen == [
        ((*inputs["input_ids"].shape, 99), ["num_items_in_batch"]),
        ((1, asked, 99), ["num_items_in_batch", "shift_labels"]),
    ]
    assert model.loss_function is own


def test_labelled_logits_are_refused_where_the_loss_is_computed_otherwise() -> None:
    model = tiny_llava()
    model.forward = lambda **_: None
    with pytest.raises(UnsupportedModel, match=r"logits: 'labelled', but the forward of LlavaFor.* leave `logits` out"):
        dropflow.attach(model, HIDROP, logits="labelled")
    assert not model._forward_hooks
    with pytest.raises(ValueError, match="logits: expected 'all' or 'labelled', got 'some'"):
        dropflow.attach(model, HIDROP, logits="some")  # type: ignore[arg-type]


def test_labelled_logits_are_refused_where_the_forward_is_replaced_on_the_model_afterwards() -> None:
    """As by trainers with fused heads, which may present their forward as the class's own."""
    model, inputs = tiny_llava().train(), labelled()
    original = model.forward

    @wraps(type(model).forward)
    def passing(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    @wraps(type(model).forward)
    def fused(labels: Tensor | None = None, **arguments: Any) -> Any:
        return Fused.forward(model, labels, **arguments)

    with dropflow.attach(model, HIDROP, logits="labelled"):
        expected = model(**inputs)
        model.forward = passing
        assert torch.equal(model(**inputs).loss, expected.loss)
        model.forward = fused
        with pytest.raises(UnsupportedModel, match=r"logits: 'labelled', but the forward .* leave `logits` out"):
            model(**inputs)
        del model.forward
        assert torch.equal(model(**inputs).loss, expected.loss)
    model.forward = fused
    with dropflow.attach(model, HIDROP):
        assert loss_of(model(**inputs)).item() == pytest.approx(expected.loss.item(), rel=1e-5)
