"""Decoders with recurrent or convolutional layers: a pruned run equals the run in which dropped tokens are absent."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hybrids import exact_delta_net, llava_nemotron_h, llava_qwen3_5
from tiny import CHUNKS_IMAGES
from torch import Tensor
from transformers import DynamicCache

import dropflow
from dropflow import Backbone
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.errors import DecisionError, PolicyError, UnsupportedCall, UnsupportedModel
from dropflow.testing import AbsentOracle, BrokenGuarantee, Tiny, tiny_models
from dropflow.testing.case import Case, relative_error, text_inputs
from dropflow.testing.guarantees import CHECKS, check_prefill
from dropflow.testing.probes import WINDOW, EveryThird, Ranked, policy, use
from dropflow_adapters.llava import Llava

FAMILIES: dict[str, tuple[type[Backbone], Tiny]] = {
    name: family
    for name, family in tiny_models().items()
    if name in ("qwen3_5", "qwen3_5_moe", "lfm2_vl", "lfm3_vl", "minicpmv4_6")
} | {"llava with qwen3_5": (Llava, llava_qwen3_5()), "llava with nemotron_h": (Llava, llava_nemotron_h())}
MODELS: dict[str, dict[str, Any]] = {name: {} for name in FAMILIES}
"""The models that the cases of a family share."""
SAMPLES = ((3, "I", 5), (1, "I", 2, "I", 10))
"""Two samples of different length, which keep different numbers of tokens."""
POLICIES: dict[str, dict[str, Any]] = {
    "hidrop": {
        "inject": {"use": "hidrop/late-injection", "at": 1},
        "pyramid": {"use": "hidrop/concave-pyramid", "keep": {2: 0.6, 4: 0.2}, "select": "exact"},
        "exit": {"use": "hidrop/early-exit", "at": 5},
    },
    "mustdrop": {
        "merge": {"use": "mustdrop/spatial-merge", "at": "output", "threshold": 0.5, "window": [2, 2]},
        "filter": {"use": "mustdrop/dual-attention", "keep": {3: 0.5, 5: 0.2}},
        "cache": {"use": "mustdrop/output-aware-cache", "at": 2},
    },
    "fastv": {"rank": {"use": "fastv/attention-rank", "at": 3, "keep": 0.4}},
    "divprune": {"diverse": {"use": "divprune/max-min", "keep": 0.4}},
}


def random_stages(seed: int) -> dict[str, Any]:
    """A window and random drops at random boundaries."""
    chance = random.Random(seed)
    entry, end = chance.randint(0, 2), chance.randint(5, 6)
    boundaries = sorted(chance.sample(range(entry, end), 2))
    keeps = dict(zip(boundaries, (0.7, 0.3), strict=True))
    return {
        "inject": {"use": "hidrop/late-injection", "at": entry},
        "draw": {"use": "control/random", "keep": keeps, "seed": seed},
        "exit": {"use": "hidrop/early-exit", "at": end},
    }


def case(family: str, stages: Mapping[str, Any], samples: Any = SAMPLES, attention: str = "sdpa") -> Case:
    adapter, tiny = FAMILIES[family]
    stated = {"name": "hybrid", "stages": stages}
    return Case(family, adapter, tiny, stated, attention, samples=samples, models=MODELS[family])


def cells() -> list[Any]:
    """Every family under every policy; those at all times that differ most from the others.

    Which tokens stay matters little to a layer: for each kind of layers, one family is pruned by several policies, its
    likes by those of the conformance kit alone.
    """
    always = {
        "qwen3_5": tuple(POLICIES),
        "lfm2_vl": ("hidrop", "mustdrop", "random 1"),
        "llava with nemotron_h": ("fastv", "mustdrop", "random 2"),
    }

    def often(family: str, which: str) -> bool:
        return which in always.get(family, ())

    return [
        pytest.param(family, which, marks=() if often(family, which) else pytest.mark.slow)
        for family in FAMILIES
        for which in (*POLICIES, "random 1", "random 2")
    ]


@pytest.mark.parametrize(("family", "which"), cells())
def test_a_policy_keeps_the_guarantees(family: str, which: str) -> None:
    stages = POLICIES.get(which) or random_stages(int(which[-1]))
    own = case(family, stages)
    assert own.oracle is AbsentOracle
    for check in CHECKS.values():
        assert check(own) < own.tiny.tolerance


@pytest.mark.parametrize("family", ["qwen3_5", "lfm2_vl"])
def test_with_eager_attention(family: str) -> None:
    assert check_prefill(case(family, WINDOW["stages"], attention="eager")) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("which", POLICIES)
def test_with_the_kernel_in_float64_nothing_is_left_of_its_round_off(which: str) -> None:
    own = replace(case("qwen3_5", POLICIES[which]), models={})
    own.model.double()
    own.drawn[0]["pixel_values"] = own.drawn[0]["pixel_values"].double()
    with exact_delta_net():
        assert check_prefill(own) < 1e-9


LIKES = ("qwen3_5_moe", "lfm3_vl")
"""Families with the layers of another one."""


@torch.no_grad()
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name in LIKES)) for name in FAMILIES]
)
def test_eight_tokens_and_three_beams_equal_the_absent_run(family: str) -> None:
    own = case(family, WINDOW["stages"])
    for how in ({"max_new_tokens": 8, "min_new_tokens": 8}, {"max_new_tokens": 4, "num_beams": 3}):
        beams = how.get("num_beams", 1)
        with text_inputs(own.text) as seen:
            own.model.generate(**own.inputs, do_sample=False, **how)
        first = seen[0]["embeds"]
        if not all(torch.equal(first[::beams], first[beam::beams]) for beam in range(beams)):
            pytest.skip("this transformers gives the beams of a sample other pictures")
        with own.attach() as flow:
            got = own.model.generate(**own.inputs, do_sample=False, **how)
            live = flow.live()[:, ::beams]
        with AbsentOracle(own.model, live, own.adapter):
            expected = own.model.generate(**own.inputs, do_sample=False, use_cache=False, **how)
        assert torch.equal(got, expected)


def turns(own: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two turns of a conversation, each with a picture."""
    return (own.tiny.prompt([[2, "I", 4]], seed=3)[0], own.tiny.prompt([[3, "I", 2]], seed=4)[0])


def joined(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both turns as one prompt."""
    along = {"input_ids": 1, "attention_mask": 1, "mm_token_type_ids": 1}
    return {name: torch.cat((first[name], second[name]), along.get(name, 0)) for name in first}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava with qwen3_5", "lfm2_vl", "llava with nemotron_h"])
def test_a_second_turn_with_a_picture_goes_on_from_the_states(family: str) -> None:
    stages = policy(keep={"use": EveryThird}, rank=use(Ranked))["stages"]
    own = case(family, stages)
    first, second = turns(own)
    whole = joined(first, second)
    cache = DynamicCache(config=own.adapter(own.model).text.config)
    with own.attach() as flow:
        own.model(**first, **{CACHE_ARGUMENT: cache})
        got = own.model(**second | {"attention_mask": whole["attention_mask"]}, **{CACHE_ARGUMENT: cache}).logits
        live = flow.live()
    with AbsentOracle(own.model, live, own.adapter) as oracle:
        expected = own.model(**whole, use_cache=False).logits[:, -got.shape[1] :]
    assert oracle.name == "absent"
    assert relative_error(got, expected) < own.tiny.tolerance


@torch.no_grad()
@pytest.mark.skipif(not CHUNKS_IMAGES, reason="this transformers refuses images in chunks")
@pytest.mark.parametrize("family", ["llava with qwen3_5", "llava with nemotron_h", "lfm2_vl"])
def test_a_chunk_without_a_live_token_leaves_the_states_alone(family: str) -> None:
    stages = {"inject": {"use": "hidrop/late-injection", "at": 1}, "exit": {"use": "hidrop/early-exit", "at": 5}}
    own = case(family, stages, samples=[(2, "I", 4)])
    budget = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with own.attach():
        whole = own.model.generate(**own.inputs, **budget)
        chunks = own.model.generate(**own.inputs, **budget, prefill_chunk_size=5)
    assert torch.equal(chunks.sequences, whole.sequences)
    for got, expected in zip(chunks.logits, whole.logits, strict=True):
        assert relative_error(got, expected) < own.tiny.tolerance


@torch.no_grad()
def test_a_ragged_batch_does_not_go_on_from_a_state() -> None:
    own = case("lfm2_vl", policy(keep={"use": EveryThird})["stages"])
    cache = DynamicCache(config=own.adapter(own.model).text.config)
    first = own.tiny.prompt([[4], [4]])[0]
    own.model(**first, **{CACHE_ARGUMENT: cache})
    second, _ = own.tiny.prompt([["I", 3], [1, "I", 2, "I"]], seed=2)
    second["attention_mask"] = torch.cat((first["attention_mask"], second["attention_mask"]), 1)
    with own.attach(), pytest.raises(UnsupportedCall, match=r"layer 0: goes on from a recurrent state, but samples"):
        own.model(**second, **{CACHE_ARGUMENT: cache})


@torch.no_grad()
def test_padding_that_would_enter_a_convolution_is_refused_and_one_sample_is_not() -> None:
    adapter, tiny = FAMILIES["lfm2_vl"]

    def build() -> Any:
        config = tiny.build().config
        config.text_config.conv_bias = True
        return type(tiny.build())(config)

    biased = Tiny(build, tiny.pictures)
    own = Case("biased", adapter, biased, policy(keep=use(EveryThird)))
    with own.attach(), pytest.raises(UnsupportedCall, match=r"layer 0: its input projection has a bias"):
        own.model(**own.inputs)
    assert check_prefill(own.with_samples([(3, "I", 5)])) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_5", "lfm2_vl"])
def test_packed_rows_are_refused_by_name(family: str) -> None:
    """A state runs on from one document into the next, and lengths of documents are counted in tokens that go."""
    own = case(family, policy(keep={"use": EveryThird})["stages"], samples=((3, "I", 5),))
    inputs, tokens = dict(own.inputs), own.inputs["input_ids"].shape[1]
    with own.attach():
        for name in ("cu_seq_lens_q", "seq_idx"):
            with pytest.raises(UnsupportedCall, match=f"{name}: states where the documents of a padding-free batch"):
                own.model(**inputs, **{name: torch.tensor([0, tokens], dtype=torch.int32)})
        del inputs["attention_mask"]
        positions = torch.cat((torch.arange(tokens - 4), torch.arange(4)))[None]
        if family == "qwen3_5":  # whose first plane holds the text positions
            positions = positions.expand(4, -1, -1)
        with pytest.raises(UnsupportedCall, match=r"position_ids: restart within a row, but layer 0 \((linear|conv)"):
            own.model(**inputs, position_ids=positions, use_cache=False)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no attention before the boundary": (
        "llava with qwen3_5",
        {"r": {"use": "pyramiddrop/pyramid", "keep": {0: 0.5}}},
        r"stages\.r: at boundary 0 it ranks by the attention of layer 0, .*rank at boundary 1 or later",
    ),
    "the layer before the boundary": (
        "qwen3_5",
        {"r": {"use": "fastv/attention-rank", "at": 1, "keep": 0.5}},
        r"stages\.r: at boundary 1 it ranks by the attention of layer 0, .*rank at boundary 2 or later",
    ),
    "no attention since vision entered": (
        "qwen3_5",
        {
            "i": {"use": "hidrop/late-injection", "at": 2},
            "r": {"use": "pyramiddrop/pyramid", "keep": {2: 0.5}},
        },
        r"stages\.r: at boundary 2 .*no layer from 2 to 2 has attention; rank at boundary 3 or later",
    ),
    "soft weights": (
        "lfm2_vl",
        {"p": {"use": "hidrop/concave-pyramid", "keep": {3: 0.5}, "select": "soft"}},
        r"stages\.p: its selection trains through attention scores, which layer 5 does not have",
    ),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_has_no_attention_to_read_is_refused_when_the_policy_is_attached(which: str) -> None:
    family, stages, message = REFUSED[which]
    own = case(family, stages)
    with pytest.raises(PolicyError, match=message):
        own.attach()
    assert not own.model._forward_hooks


@torch.no_grad()
def test_an_injection_that_the_data_decides_is_refused_at_the_ranking() -> None:
    class Late(dropflow.Stage[Any]):
        @dropflow.hookimpl
        def inject(self, call: Any) -> int:  # noqa: ARG002
            return 2

    own = case("qwen3_5", policy(late=use(Late), rank=use(Ranked))["stages"])
    with own.attach(), pytest.raises(DecisionError, match=r"layer 2: has no attention, nor has any layer since"):
        own.model(**own.inputs)


@torch.no_grad()
def test_a_cache_that_does_not_know_its_layers_is_refused() -> None:
    own = case("lfm2_vl", WINDOW["stages"])
    with own.attach(), pytest.raises(UnsupportedModel, match=r"make it by DynamicCache\(config=model\.config\)"):
        own.model(**own.inputs, **{CACHE_ARGUMENT: DynamicCache()})


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_5", "lfm2_vl", "llava with nemotron_h"])
def test_the_report_counts_entries_only_where_there_are_some(family: str) -> None:
    own = case(family, WINDOW["stages"])
    attends = own.adapter(own.model).shape.attends
    with own.attach() as flow:
        cache = getattr(own.model(**own.inputs), CACHE_ARGUMENT)
        report = flow.report()
    held = [
        sum(layer.full_index().tokens.tolist()) / 2 if attends(number) else 0
        for number, layer in enumerate(cache.layers)
    ]
    assert [layer.kv_entries for layer in report.layers] == held
    assert 0 < report.flops < report.flops_dense
    assert report.kv_bytes_dense == pytest.approx(report.kv_bytes / sum(held) * dense_entries(own))


def dense_entries(own: Case) -> float:
    """Entries that all layers with attention would hold without a policy, mean over samples."""
    layers = sum(map(own.adapter(own.model).shape.attends, range(6)))
    return layers * float(own.real.sum()) / len(own.real)


def no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dropflow.engine.decoder.recurrent._padding_mask", lambda *_: None)


def late_tokens_are_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    from dropflow.engine.tokens.live_set import LiveSet

    restrict = LiveSet.restrict

    def emptied(live: LiveSet, before: LiveSet, states: Tensor, raw: Tensor | None) -> Tensor:
        return restrict(live, before, states, None if raw is None else torch.zeros_like(raw))

    monkeypatch.setattr(LiveSet, "restrict", emptied)


def empty_chunks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from dropflow.engine.decoder import prompt_run

    run = prompt_run.run_without_attention
    monkeypatch.setattr(
        prompt_run, "run_without_attention", lambda *args, live, **more: run(*args, live=max(live, 1), **more)
    )


@torch.no_grad()
@pytest.mark.parametrize("fault", [no_mask, late_tokens_are_zeros])
def test_planted_faults_are_found(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = case("lfm2_vl" if fault is late_tokens_are_zeros else "qwen3_5", WINDOW["stages"])
    check_prefill(own)
    fault(monkeypatch)
    with pytest.raises(BrokenGuarantee, match="differ from the absent run's"):
        check_prefill(own)


@torch.no_grad()
@pytest.mark.skipif(not CHUNKS_IMAGES, reason="this transformers refuses images in chunks")
def test_a_chunk_without_a_live_token_must_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {"inject": {"use": "hidrop/late-injection", "at": 1}}
    own = case("llava with qwen3_5", stages, samples=[(2, "I", 4)])
    budget = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with own.attach():
        right = own.model.generate(**own.inputs, **budget, prefill_chunk_size=5).logits[0]
        empty_chunks_run(monkeypatch)
        with pytest.raises(UnsupportedCall, match="goes on from a recurrent state"):
            own.model.generate(**own.inputs, **budget, prefill_chunk_size=5)
    assert right.isfinite().all()
