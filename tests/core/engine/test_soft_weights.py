"""How a stage's soft weights affect attention, the loss and gradients, and when they have no effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_training import enable_checkpointing, gradients, labelled
from tiny import policy, tiny_llava

import dropflow
from dropflow import Keep, PruneCall, Stage, hookimpl
from dropflow.errors import DecisionError, UnsupportedCall
from dropflow.testing import BrokenGuarantee, MaskedOracle, assert_stage_conforms, tiny_models


class Weighs(Stage[Any]):
    """Keeps every other visual token; weights are a function of a parameter, one number per logical token."""

    prune_at = (2,)
    differentiable = True
    parameter: torch.Tensor | None = None
    calls: list[PruneCall]

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        keep = (call.image_id < 0) | (call.index % 2 == 0)
        if type(self).parameter is None:
            return Keep(keep)
        weights = type(self).parameter.gather(1, call.index).exp()
        return Keep(keep, weights=weights)


@pytest.fixture
def parameter() -> Any:
    inputs = labelled()
    Weighs.parameter = torch.zeros(inputs["input_ids"].shape, requires_grad=True)
    yield Weighs.parameter
    Weighs.parameter = None


WEIGHS = policy(weigh={"use": Weighs})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_gradient_of_weights_is_that_of_finite_differences(attention: str, parameter: torch.Tensor) -> None:
    model, inputs = tiny_llava(attention=attention).train(), labelled()
    with dropflow.attach(model, WEIGHS) as flow:
        model(**inputs).loss.backward()
        kept = flow.live()[2] & (inputs["input_ids"] == 98)
        got = parameter.grad
        assert (got[~kept] == 0).all()
        assert (got[kept] != 0).all()
        for row, token in kept.nonzero()[::5].tolist():
            losses = []
            for step in (0.05, -0.05):
                parameter.data[row, token] = step
                losses.append(model(**inputs).loss.item())
            parameter.data[row, token] = 0
            assert (losses[0] - losses[1]) / 0.1 == pytest.approx(got[row, token].item(), rel=5e-3, abs=1e-5)


def test_weights_near_zero_are_what_dropping_is(parameter: torch.Tensor) -> None:
    model, inputs = tiny_llava().train(), labelled()
    visual = inputs["input_ids"] == 98
    gone = visual & (torch.arange(visual.shape[1]) % 4 == 0)
    with dropflow.attach(model, WEIGHS) as flow:
        parameter.data[gone] = -60.0
        loss = model(**inputs).loss
        live = flow.live()
    live[2:] &= ~gone
    with MaskedOracle(model, live):
        expected = model(**inputs, use_cache=False).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_weights_do_nothing_without_gradients_or_in_eval(parameter: torch.Tensor) -> None:
    model, inputs = tiny_llava(), labelled()
    parameter.data.normal_()
    masks: list[Any] = []
    layer = model.get_decoder()._modules["layers"][3]
    layer.register_forward_pre_hook(lambda _, __, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    found = []
    for given in (True, False):
        Weighs.parameter = parameter if given else None
        with dropflow.attach(model, WEIGHS):
            found.append(model.eval()(**inputs).loss)
            with torch.no_grad():
                found.append(model.train()(**inputs).loss)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert [mask.dtype for mask in masks] == [torch.bool] * 4


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_changes_no_gradient(reentrant: bool, parameter: torch.Tensor) -> None:
    model, inputs = tiny_llava().train(), labelled()
    model.config.use_cache = model.get_decoder().config.use_cache = False
    runs = []
    for checkpointed in (False, True):
        if checkpointed:
            enable_checkpointing(model, reentrant)
        with dropflow.attach(model, WEIGHS):
            model(**inputs).loss.backward()
        runs.append(gradients(model) | {"weights": parameter.grad.clone()})
        parameter.grad = None
    assert runs[0].keys() == runs[1].keys()
    assert runs[0]["weights"].abs().max() > 1e-4
    for name, expected in runs[0].items():
        assert torch.allclose(runs[1][name], expected, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda _: torch.ones(1, 3), r"stages\.bad: at boundary 2 .* \(1, 3\), expected a float dtype and \(3, "),
        (lambda call: torch.ones_like(call.index), "torch.int64"),
        (lambda call: torch.zeros(call.index.shape), "not positive and finite"),
        (lambda call: torch.full(call.index.shape, torch.nan), "not positive and finite"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights: Any, message: str) -> None:
    class Bad(Stage[Any]):
        prune_at = (2,)
        differentiable = True

        @hookimpl
        def prune(self, call: PruneCall) -> Keep:
            return Keep(call.image_id % 2 == 0, weights=weights(call))

    model, inputs = tiny_llava().train(), labelled()
    plain = model(**inputs).loss
    with dropflow.attach(model, policy(bad={"use": Bad})), pytest.raises(DecisionError, match=message):
        model(**inputs)
    assert torch.equal(model(**inputs).loss, plain)


def test_flash_attention_cannot_train_a_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_llava(), labelled()
    with dropflow.attach(model.train(), WEIGHS):
        monkeypatch.setattr(model.get_decoder().config, "_attn_implementation_internal", "flash_attention_2")
        with pytest.raises(UnsupportedCall, match=r"stages\.weigh: .*'flash_attention_2'.*'sdpa' or 'eager'"):
            model(**inputs)


def test_rows_carry_gradient_for_those_who_ask_alone() -> None:
    seen: dict[str, list[bool]] = {}

    def reads(name: str, asks: bool) -> type[Stage[Any]]:
        class Reads(Stage[Any]):
            prune_at = (2, 4)
            differentiable = asks

            @hookimpl
            def prune(self, call: PruneCall) -> None:
                rows = call.attention_rows(call.boundary, call.instruction_slots)
                seen.setdefault(name, []).append(rows.requires_grad)

        return Reads

    model, inputs = tiny_llava(), labelled()
    stages = {name: {"use": reads(name, asks)} for name, asks in (("before", False), ("asks", True), ("after", False))}
    with dropflow.attach(model, policy(**stages)):
        model.train()(**inputs)
        assert seen == {"before": [False] * 2, "asks": [True] * 2, "after": [False] * 2}
        seen.clear()
        model.eval()(**inputs)
        with torch.no_grad():
            model.train()(**inputs)
    assert not any(flag for flags in seen.values() for flag in flags)


def test_the_kit_catches_weights_that_are_applied_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    class Soft(Stage[Any]):
        prune_at = (2,)
        differentiable = True

        @hookimpl
        def prune(self, call: PruneCall) -> Keep:
            rows = call.attention_rows(2, call.instruction_slots).mean((1, 2))[:, -call.index.shape[1] :]
            return Keep((call.image_id >= 0).cumsum(1) % 2 == 0, weights=1 + rows - rows.detach())

    models = {"llava": tiny_models()["llava"]}
    (cell,) = assert_stage_conforms(Soft, options={}, models=models)
    assert cell.outcome == "run"

    def forgets(weights: Any) -> Any:
        return lambda mask, log_weights, dtype: weights(mask, log_weights.detach(), dtype)

    from dropflow.engine.decoder import layer_arguments

    monkeypatch.setattr(layer_arguments, "weighted_mask", forgets(layer_arguments.weighted_mask))
    with pytest.raises(BrokenGuarantee, match=r"the gradient of .* differs from the masked run's"):
        assert_stage_conforms(Soft, options={}, models=models)
