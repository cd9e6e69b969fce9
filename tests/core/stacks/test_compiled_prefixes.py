"""Questions that begin with a prefix on a static cache are answered as if asked anew, also by compiled steps."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from compiled_answers import compiling, graphs, static
from counted_graphs import Graphs
from prefixed import BUDGET, POLICIES, TAILS, after_prefix, asked, shown
from tiny import HIDROP, policy, relative_error, tiny_llava
from transformers import DynamicCache, StaticCache

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.tokens import static_layers
from dropflow.engine.tokens.static_layers import StaticFlowLayer
from dropflow.errors import UnsupportedCall, UnsupportedModel
from dropflow.testing.case import Case
from dropflow.testing.families import tiny_models

__all__ = ["graphs"]  # a fixture
STATIC = [which for which in POLICIES if which != "parked entries"]
"""Policies that go with static caches."""
EAGER: dict[str, Any] = {**BUDGET, "do_sample": False, "cache_implementation": "static", "disable_compile": True}


@pytest.mark.parametrize("positions", ["persistent", "compact"])
@pytest.mark.parametrize("which", STATIC)
@torch.no_grad()
def test_answers_are_those_of_the_whole_prompt(llava: Any, which: str, positions: str) -> None:
    inputs, after = asked(), after_prefix(asked())
    with (
        mock.patch.object(static_layers, "STRIDE", 1),
        dropflow.attach(llava, {**POLICIES[which], "positions": positions}) as flow,
    ):
        anew, live, kept = llava(**inputs).logits, flow.live(), flow.report().kv_bytes
        expected = llava.generate(**inputs, **BUDGET, do_sample=False)
        told = flow.report()
        prefix = flow.prefix(**shown())
        for _ in range(2):  # several continuations from one prefix
            given = prefix.inputs(**inputs, **{CACHE_ARGUMENT: static(llava)})
            again = llava(**given).logits
            assert relative_error(again[after], anew[after]) < 1e-5
            assert torch.equal(flow.live(), live)
            assert flow.report().kv_bytes == kept
            assert all(isinstance(layer, StaticFlowLayer) for layer in given[CACHE_ARGUMENT].layers)
        assert torch.equal(llava.generate(**prefix.inputs(**inputs), **EAGER), expected)
        found = flow.report()
        given = prefix.inputs(**inputs, **{CACHE_ARGUMENT: static(llava)})
        assert torch.equal(llava.generate(**given, **BUDGET, do_sample=False), expected)
        assert found.kv_bytes == told.kv_bytes
        assert [one.visual_tokens for one in found.layers] == [one.visual_tokens for one in told.layers]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_steps_have_the_logits_of_a_whole_prompt(llava: Any, side: str) -> None:
    inputs, word = asked(side=side), torch.tensor([[5], [6], [7]])
    ids = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    more = {
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
        "position_ids": ids[:, -1:] + 1,
    }
    for which in ("hidrop", "encode", "fastv", "mustdrop"):
        with dropflow.attach(llava, POLICIES[which]) as flow:
            prefix, steps = flow.prefix(**shown()), []
            for given in (
                inputs | {CACHE_ARGUMENT: DynamicCache(config=llava.config)},
                prefix.inputs(**inputs),
                prefix.inputs(**inputs, **{CACHE_ARGUMENT: static(llava)}),
            ):
                llava(**given, position_ids=ids)
                steps.append(llava(input_ids=word, **more, **{CACHE_ARGUMENT: given[CACHE_ARGUMENT]}).logits)
        assert relative_error(steps[1], steps[0]) < 1e-5
        assert relative_error(steps[2], steps[0]) < 1e-5


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
@torch.no_grad()
def test_beams_and_samples(llava: Any, mode: dict[str, Any]) -> None:
    with dropflow.attach(llava, HIDROP) as flow:
        prefix, found = flow.prefix(**shown()), []
        for given in (asked(), prefix.inputs(**asked())):
            torch.manual_seed(0)
            found.append(llava.generate(**given, **(EAGER | mode)))
    assert torch.equal(*found)


SLOW = [pytest.param(which, marks=pytest.mark.slow) for which in ("fastv", "encode", "pyramiddrop", "mustdrop")]
"""Their layers hold what some layer holds under HiDrop: all visual tokens, some, or none."""


@pytest.mark.parametrize("which", ["hidrop", *SLOW])
@torch.no_grad()
def test_steps_after_it_compile_to_one_graph(llava: Any, graphs: Graphs, which: str) -> None:
    options = compiling(graphs)
    with dropflow.attach(llava, POLICIES[which]) as flow:
        prefix, ready = flow.prefix(**shown()), None
        for tails in (TAILS, tuple(tail[::-1] for tail in TAILS)):
            expected = llava.generate(**asked(tails), **BUDGET, do_sample=False)
            ready = prefix.inputs(**asked(tails))
            assert torch.equal(llava.generate(**ready, **options), expected)
        assert graphs.made == 1 + (which == "mustdrop")  # which keeps as many as a question needs
        with pytest.raises(UnsupportedCall, match="a call has begun with this cache of a prefix already"):
            llava.generate(**ready, **options)
        given = prefix.inputs(**asked(), **{CACHE_ARGUMENT: static(llava)})
        own = {name: value for name, value in options.items() if name != "cache_implementation"}
        expected = llava.generate(**asked(), **BUDGET, do_sample=False)
        assert torch.equal(llava.generate(**given, **own), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "lfm2_vl", "qwen3_5"])
@torch.no_grad()
def test_families_whose_steps_compile(graphs: Graphs, family: str) -> None:
    adapter, tiny = tiny_models()[family]
    case = Case(family, adapter, tiny, policy(few={"use": "divprune/max-min", "keep": 5})).padded_left()
    with case.attach() as flow:
        prefix = flow.prefix(**case.single(0))
        row, pictures = case.single(0)["input_ids"][0].tolist(), case.drawn[1][0]
        rows = [[*row[: prefix.tokens], *tail] for tail in TAILS]
        inputs = tiny.collate(rows, [pictures] * len(rows), "left")
        expected = case.model.generate(**inputs, **BUDGET, do_sample=False)
        assert torch.equal(case.model.generate(**prefix.inputs(**inputs), **compiling(graphs)), expected)
    assert graphs.made == 1


@torch.no_grad()
def test_a_question_cannot_change_the_prefix(llava: Any) -> None:
    with dropflow.attach(llava, POLICIES["fastv"]) as flow:
        prefix = flow.prefix(**shown())
        before = [part.clone() for keys, values, _ in prefix._ahead.entries.values() for part in (keys, values)]
        llava.generate(**prefix.inputs(**asked()), **EAGER)
        llava(**prefix.inputs(**asked(), **{CACHE_ARGUMENT: static(llava)}))
        after = [part for keys, values, _ in prefix._ahead.entries.values() for part in (keys, values)]
    assert all(torch.equal(*both) for both in zip(before, after, strict=True))


@torch.no_grad()
def test_what_follows_the_prefix_alone_on_a_static_cache(llava: Any) -> None:
    tail = torch.tensor([TAILS[0]])
    with dropflow.attach(llava, HIDROP) as flow:
        prefix = flow.prefix(**shown())
        cache = static(llava)
        given = prefix.inputs_after(input_ids=tail, **{CACHE_ARGUMENT: cache})
        assert given[CACHE_ARGUMENT] is cache
        anew = llava(**asked([TAILS[0]])).logits[:, -1]
        assert relative_error(llava(**given).logits[:, -1], anew) < 1e-5
        assert int(cache.get_seq_length()) == 24


@torch.no_grad()
def test_it_rides_on_the_cache_until_a_call_begins(llava: Any) -> None:
    with dropflow.attach(llava, HIDROP) as flow:
        prefix = flow.prefix(**shown())
        ready, late, spent, emptied = (prefix.inputs(**asked(), **{CACHE_ARGUMENT: static(llava)}) for _ in range(4))
        llava(**spent)
        with pytest.raises(UnsupportedCall, match="a call has begun with this cache of a prefix already"):
            llava(**spent)
        emptied[CACHE_ARGUMENT].reset()
        assert int(emptied[CACHE_ARGUMENT].get_seq_length()) == 0
        expected = llava(**asked()).logits
        cache = emptied[CACHE_ARGUMENT]
        assert relative_error(llava(**asked(), **{CACHE_ARGUMENT: cache}).logits, expected) < 1e-5
    with pytest.raises(UnsupportedCall, match="written under a policy"):
        llava(**ready)
    with pytest.raises(UnsupportedCall, match="written under a policy"):  # `generate` makes its mask beforehand
        llava.generate(**late, **BUDGET, disable_compile=True)
    with pytest.raises(ValueError, match="cache_implementation"):  # as without Dropflow
        llava.generate(**ready, **EAGER)


def _refused(llava: Any, prefix: Any) -> dict[str, tuple[Any, str]]:
    inputs, used = asked(), static(llava)
    llava(**asked(), **{CACHE_ARGUMENT: used})
    return {
        "grows": (
            lambda: prefix.inputs(**inputs, **{CACHE_ARGUMENT: DynamicCache()}),
            "expected a new StaticCache, got DynamicCache",
        ),
        "used": (lambda: prefix.inputs(**inputs, **{CACHE_ARGUMENT: used}), "expected a new StaticCache"),
        "small": (
            lambda: llava(**prefix.inputs(**inputs, **{CACHE_ARGUMENT: static(llava, 26)})),
            "a static cache of 26 tokens cannot hold 27",
        ),
        "offloaded": (
            lambda: llava.generate(**prefix.inputs(**inputs), max_new_tokens=2, cache_implementation="offloaded"),
            "cache_implementation: 'offloaded' cannot begin with a prefix",
        ),
    }


@pytest.mark.parametrize("name", ["grows", "used", "small", "offloaded"])
@torch.no_grad()
def test_other_caches_are_refused_before_a_layer_runs(llava: Any, name: str) -> None:
    ran: list[int] = []
    with dropflow.attach(llava, HIDROP) as flow:
        prefix = flow.prefix(**shown())
        call, message = _refused(llava, prefix)[name]
        handle = llava.model.language_model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
        with pytest.raises(UnsupportedCall, match=message):
            call()
        handle.remove()
    assert not ran


@torch.no_grad()
def test_policies_that_go_without_static_caches(llava: Any) -> None:
    for which in (POLICIES["parked entries"], {**POLICIES["fastv"], "recall": True}):
        with dropflow.attach(llava, which) as flow:
            prefix = flow.prefix(**shown())
            with pytest.raises(UnsupportedModel, match="static cache does not go with this policy"):
                llava(**prefix.inputs(**asked(), **{CACHE_ARGUMENT: static(llava)}))
            short = StaticCache(tiny_llava(layers=2).config.get_text_config(), max_cache_len=64)
            with pytest.raises(UnsupportedModel, match="static cache"):
                llava(**prefix.inputs(**asked(), **{CACHE_ARGUMENT: short}))


@torch.no_grad()
def test_a_policy_that_keeps_everything_under_flash_attention() -> None:
    """Its layers of a static cache would stay the model's own, but not after a prefix."""
    from flash_stand_in import registered

    with registered() as name:
        model = tiny_llava()
        model.get_decoder().config._attn_implementation = name
        with dropflow.attach(model, policy(all={"use": "control/keep-all"})) as flow:
            prefix = flow.prefix(**shown())
            with pytest.raises(UnsupportedModel, match="counts entries, and would count empty ones"):
                model(**prefix.inputs(**asked(), **{CACHE_ARGUMENT: static(model)}))
