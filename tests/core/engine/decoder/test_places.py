"""Llama 4: chunked attention is exact, and so are its scaled queries as long as their scale is 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from watching import rows_at

import dropflow
from dropflow import Stage
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.decoder import prompt_run
from dropflow.errors import UnsupportedCall
from dropflow.lifecycle.payloads import PruneCall
from dropflow.testing import MaskedOracle, Tiny, tiny_models
from dropflow.testing.case import relative_error
from dropflow.testing.probes import policy

if "llama4" not in tiny_models():
    pytest.skip("the installed transformers cannot read images with Llama 4", allow_module_level=True)

TINY: Tiny = tiny_models()["llama4"][1]
RANKED = {"use": "fastv/attention-rank", "at": 1, "keep": 0.4}
DROPS = policy(a={"use": "control/random", "keep": {1: 0.5, 4: 0.2}, "seed": 3})
LONG = [(3, "I", 5)]


def model_of(floor_scale: int, attention: str = "sdpa", *, tuning: bool = True) -> Any:
    """A tiny Llama 4, of whose layers 2 and 5 do not rotate and so scale queries by place."""
    model = TINY.model(attention)
    for config in (model.language_model.model.config, model.config.text_config):
        config.floor_scale, config.attn_temperature_tuning = floor_scale, tuning
    for layer in model.language_model.model.layers:
        layer.self_attn.floor_scale, layer.self_attn.attn_temperature_tuning = floor_scale, tuning
    return model


def compared(model: Any, which: dict[str, Any]) -> float:
    inputs = TINY.prompt()[0]
    with torch.no_grad(), dropflow.attach(model, which) as flow:
        logits, live = model(**inputs).logits, flow.live()
    with torch.no_grad(), MaskedOracle(model, live):
        expected = model(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    assert not live.all()
    return relative_error(logits[real], expected[real])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("which", [DROPS, policy(a=RANKED)], ids=["random", "ranked"])
def test_below_the_floor_everything_is_exact(which: dict[str, Any], attention: str) -> None:
    assert compared(model_of(8192, attention), which) < 1e-5


def test_from_the_floor_on_a_call_is_refused_before_any_layer_runs() -> None:
    model, inputs = model_of(4), TINY.prompt()[0]
    ran: list[Any] = []
    handle = model.language_model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    told = (
        r"layer 2: scales its queries by their place .* from 4 tokens on, and there are 50; shorten the prompt, or set"
    )
    with dropflow.attach(model, DROPS), pytest.raises(UnsupportedCall, match=told):
        model(**inputs)
    handle.remove()
    assert not ran


def test_without_the_refusal_a_long_call_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_run, "check_places", lambda *_: None)
    assert compared(model_of(4), DROPS) > 1e-3
    assert compared(model_of(4, tuning=False), DROPS) < 1e-5


def test_what_cannot_be_wrong_is_not_refused() -> None:
    """No tuning, a forecast that everything stays, or drops after the last layer that scales."""
    assert compared(model_of(4, tuning=False), DROPS) < 1e-5
    model, inputs = model_of(4), TINY.prompt()[0]
    with torch.no_grad():
        plain = model(**inputs).logits
        with dropflow.attach(model, policy(a={"use": "control/keep-all"})):
            assert torch.equal(model(**inputs).logits, plain)
        with pytest.raises(UnsupportedCall, match="layer 5: scales"), dropflow.attach(model, late(5)):
            model(**inputs)
    for config in (model.language_model.model.config, model.config.text_config):
        config.no_rope_layers = [1, 1, 0, 1, 1, 1]
    model.language_model.model.layers[5].self_attn.attn_temperature_tuning = False
    assert compared(model, late(5)) < 1e-5


@torch.no_grad()
def test_a_question_that_begins_with_a_prefix_has_other_places() -> None:
    """Up to the boundary, layers do not see the tokens of the prefix in the call, though nothing is dropped."""
    model, inputs = model_of(4), TINY.prompt(LONG)[0]
    whole = policy(a={"use": "control/random", "keep": {4: 1.0}, "seed": 3})
    with dropflow.attach(model, whole) as flow:
        prefix = flow.prefix(**inputs)
        with pytest.raises(UnsupportedCall, match="layer 2: scales its queries by their place"):
            model(**prefix.inputs(**inputs))
    model = model_of(8192)
    with dropflow.attach(model, whole) as flow:
        anew = model(**inputs).logits[:, -1]
        again = model(**flow.prefix(**inputs).inputs(**inputs)).logits[:, -1]
    assert relative_error(again, anew) < 1e-5


def late(boundary: int) -> dict[str, Any]:
    return policy(a={"use": "control/random", "keep": {boundary: 0.5}, "seed": 3})


@torch.no_grad()
def test_earlier_turns_count() -> None:
    inputs = TINY.prompt(LONG)[0]
    tokens = inputs["input_ids"].shape[1]
    model = model_of(2 * tokens)
    with dropflow.attach(model, DROPS):
        cache = DynamicCache(config=model.config.text_config)
        model(**inputs, **{CACHE_ARGUMENT: cache})
        mask = torch.ones(1, 2 * tokens, dtype=torch.long)
        with pytest.raises(UnsupportedCall, match=rf"from {2 * tokens} tokens on, and there are {2 * tokens}"):
            model(**inputs | {"attention_mask": mask}, **{CACHE_ARGUMENT: cache})


@pytest.mark.parametrize("boundary", [2, 4])
@torch.no_grad()
def test_attention_rows_equal_the_eager_map(boundary: int) -> None:
    """Ranking projects only what it reads, and rotates the zeros of what it does not as complex numbers."""

    model, inputs, maps = model_of(8192, "eager"), TINY.prompt(LONG)[0], list[Tensor]()
    with dropflow.attach(model, policy(a=late(1)["stages"]["a"], rows={"use": rows_at(boundary)})) as flow:
        model(**inputs)
        found, live = dict(flow.plan.stages)["rows"].rows[0], flow.live()
    attention = model.language_model.model.layers[boundary].self_attn
    handle = attention.register_forward_hook(lambda _, __, output: maps.append(output[1]))
    with MaskedOracle(model, live):
        model(**inputs, use_cache=False)
    handle.remove()
    assert relative_error(found, maps[0][0, :, -1, live[boundary, 0]]) < 1e-5


@torch.no_grad()
def test_labels_of_a_core_with_a_head_tell_the_instruction_tokens() -> None:
    """The token before every labelled span, and the model's own loss on states of all logical tokens."""

    class Asks(Stage[Any]):
        @property
        def prune_at(self) -> tuple[int, ...]:
            return (1,)

        @dropflow.hookimpl
        def prune(self, call: PruneCall) -> None:
            self.asked = call.instruction_slots[call.instruction_valid].tolist()

    model, inputs = model_of(8192), TINY.prompt(LONG)[0]
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -2:] = inputs["input_ids"][0, -2:]
    with dropflow.attach(model, policy(asks={"use": Asks}, a=RANKED)) as flow:
        loss, live = model(**inputs, labels=labels).loss, flow.live()
        assert dict(flow.plan.stages)["asks"].asked == [inputs["input_ids"].shape[1] - 3]
    with MaskedOracle(model, live):
        assert relative_error(loss, model(**inputs, labels=labels, use_cache=False).loss) < 1e-5
