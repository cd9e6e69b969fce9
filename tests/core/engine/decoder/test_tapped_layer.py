"""Stages read the attention of layers that ran on other tokens than those now live."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import HIDROP, policy, prompt, relative_error, tiny_llava
from torch import Tensor
from transformers import DynamicCache

import dropflow
from dropflow import CacheCall, CacheKeep, Keep, PruneCall, Stage, hookimpl
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.errors import DecisionError
from dropflow.testing import MaskedOracle

PYRAMID = HIDROP["stages"]["pyramid"]


class ReadsAtTheEnd(Stage[Any]):
    """Reads the last token's attention in several layers after the prefill."""

    taps = (0, 1, 3, 5)

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.call: CacheCall | None = None
        self.rows: dict[int, Tensor] = {}

    @hookimpl
    def decode_cache(self, call: CacheCall) -> None:
        self.call = call
        self.rows = {layer: call.attention_rows(layer, call.last_rows) for layer in self.taps}


class Evicts(Stage[Any]):
    """Evicts every second visual entry of layers 1 and 3."""

    @hookimpl
    def decode_cache(self, call: CacheCall) -> CacheKeep:
        return CacheKeep({layer: call.layers[layer].index % 2 == 0 for layer in (1, 3)})


def attention_maps(model: Any, live: Tensor, inputs: dict[str, Any]) -> list[Tensor]:
    """(batch, heads, tokens, tokens) of every layer of the masked full-length run."""
    maps: list[Tensor] = []
    layers = model.get_decoder()._modules["layers"]
    handles = [one.self_attn.register_forward_hook(lambda _, __, output: maps.append(output[1])) for one in layers]
    with MaskedOracle(model, live):
        model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return maps


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("before", [{}, {"evict": {"use": Evicts}}, {"e": {"use": Evicts}, "f": {"use": Evicts}}])
@torch.no_grad()
def test_attention_of_the_prefill_is_that_of_the_masked_run(before: dict[str, Any], side: str) -> None:
    model, inputs = tiny_llava(attention="eager"), prompt(side=side)
    stages = HIDROP["stages"] | before | {"reads": {"use": ReadsAtTheEnd}}
    with dropflow.attach(model, policy(**stages)) as flow:
        model(**inputs)
        live, (_, stage) = flow.live(), flow.plan.stages[-1]
    last = [int(own.nonzero()[-1]) for own in inputs["attention_mask"]]
    assert stage.call.last_rows[:, 0].tolist() == last
    maps = attention_maps(model, live, inputs)
    for layer, rows in stage.rows.items():
        view = stage.call.layers[layer]
        for sample, token in enumerate(last):
            seen = view.valid[sample]
            expected = maps[layer][sample, :, token, view.index[sample, seen]]
            assert relative_error(rows[sample, :, 0, seen], expected) < 1e-5
    assert stage.call.layers[1].index.shape[1] < inputs["input_ids"].shape[1] or not before


@torch.no_grad()
def test_attention_at_decode_steps_counts_the_calls_own_tokens(llava: Any) -> None:
    class Decodes(ReadsAtTheEnd):
        decode_every = 1

    with dropflow.attach(llava, policy(p=PYRAMID, reads={"use": Decodes})) as flow:
        cache, inputs = DynamicCache(), prompt([(3, "I", 5)])
        llava(**inputs, **{CACHE_ARGUMENT: cache})
        llava(input_ids=torch.tensor([[5]]), **{CACHE_ARGUMENT: cache})
        stage = flow.plan.stages[-1][1]
        assert stage.call.last_rows.tolist() == [[0]]
        llava(input_ids=torch.tensor([[5, 6, 7]]), **{CACHE_ARGUMENT: cache})
        assert stage.call.last_rows.tolist() == [[2]]
    assert [rows.shape[3] for rows in stage.rows.values()] == [29, 29, 20, 15]
    assert all(torch.allclose(rows.sum(-1), torch.ones(1)) for rows in stage.rows.values())


class ReadsLater(Stage[Any]):
    """Reads layer 1, which ran on all tokens, when only a few of them remain."""

    taps = (1,)

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.calls: dict[int, PruneCall] = {}
        self.read: dict[int, tuple[Tensor, ...]] = {}

    @property
    def prune_at(self) -> tuple[int, ...]:
        return (2, 5)

    @hookimpl
    def prune(self, call: PruneCall) -> Keep | None:
        self.calls[call.boundary] = call
        rows = call.attention_rows(1, call.instruction_slots)
        self.read[call.boundary] = (rows, call.keys(1), *call.rotary(1))
        return None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_boundary_reads_an_earlier_layer_although_tokens_were_dropped_since(attention: str) -> None:
    model, inputs = tiny_llava(attention=attention), prompt()
    with dropflow.attach(model, policy(reads={"use": ReadsLater}, p=PYRAMID)) as flow:
        model(**inputs)
        (_, stage), live = flow.plan.stages[0], flow.live()
    rows, keys, cos, sin = stage.read[5]
    whole, call = stage.read[2], stage.calls[5]
    assert call.index.shape[1] < stage.calls[2].index.shape[1] == inputs["input_ids"].shape[1]
    model.set_attn_implementation("eager")
    maps = attention_maps(model, live, inputs)
    for sample, token in enumerate([inputs["input_ids"].shape[1] - 1] * 3):
        own = call.index[sample, call.valid[sample]]
        expected = maps[1][sample, :, token, own]
        assert relative_error(rows[sample, :, 0, call.valid[sample]], expected) < 1e-5
        assert torch.equal(keys[sample][:, call.valid[sample]], whole[1][sample][:, own])
        assert torch.equal(cos[sample, call.valid[sample]], whole[2][sample, own])
        assert torch.equal(sin[sample, call.valid[sample]], whole[3][sample, own])


@torch.no_grad()
def test_a_layer_before_vision_entered_is_refused_at_a_boundary(llava: Any) -> None:
    late = policy(inject={"use": "hidrop/late-injection", "at": 2}, reads={"use": ReadsLater})
    with (
        dropflow.attach(llava, late),
        pytest.raises(DecisionError, match=r"stages\.reads: layer 1: ran before vision entered at boundary 2"),
    ):
        llava(**prompt())
