"""Decode steps on a static cache compile to one graph under every policy, and answer what they answer uncompiled."""

from __future__ import annotations

import pickle
import threading
from copy import deepcopy
from typing import Any
from unittest import mock

import pytest
import torch
from compiled_answers import FASTV, HIDROP, TOKENS, asked, compiling, graphs, static
from counted_graphs import Graphs
from tiny import CHUNKS_IMAGES, policy, prompt, relative_error, tiny_llava
from torch import Tensor
from transformers import DynamicCache, StaticCache

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.tokens import static_layers
from dropflow.engine.tokens.static_layers import StaticFlowLayer
from dropflow.errors import UnsupportedCall, UnsupportedModel
from dropflow.testing.case import Case
from dropflow.testing.families import tiny_models
from dropflow.testing.static_steps import check_compiled_steps

__all__ = ["graphs"]  # a fixture
POLICIES = {
    "hidrop": HIDROP,
    "compact": FASTV | {"positions": "compact"},
    "encode": policy(prune={"use": "divprune/max-min", "keep": 6}),
    "evicts": policy(cache={"use": "mustdrop/output-aware-cache", "at": 2}),
    "keep-all": policy(all={"use": "control/keep-all"}),
}


@pytest.fixture
def model() -> Any:
    return tiny_llava(layers=3)


@pytest.mark.parametrize("which", POLICIES)
@torch.no_grad()
def test_generate_compiles_one_graph_for_all_prompts(model: Any, graphs: Graphs, which: str) -> None:
    prompts = [prompt(seed=seed) for seed in range(3)]
    with dropflow.attach(model, POLICIES[which]) as flow:
        for inputs in prompts:
            expected = model.generate(**inputs, **TOKENS)
            told = flow.report()
            found = model.generate(**inputs, **compiling(graphs), return_dict_in_generate=True)
            assert torch.equal(found.sequences, expected)
            assert str(flow.report()) == str(told)
        assert graphs.made == 1
        limit = found.past_key_values.layers[0].get_max_length()
        kept = [layer.keys.shape[-2] for layer in found.past_key_values.layers]
        if which == "keep-all":
            assert set(kept) == {limit}
        else:  # as much room as a layer without drops has after the prompt
            assert all(isinstance(layer, StaticFlowLayer) for layer in found.past_key_values.layers)
            held = [int(layer.entries) for layer in found.past_key_values.layers]
            assert {size - own for size, own in zip(kept, held, strict=True)} == {
                limit - inputs["input_ids"].shape[1] - 5
            }
            assert min(kept) < limit or which == "evicts"


SLOW_WAYS = [pytest.param(way, marks=pytest.mark.slow) for way in ("in place", "forward", "text decoder", "layers")]
"""Ways by which prompts are compiled, too, in pieces."""


@pytest.mark.parametrize("way", ["wrapped", *SLOW_WAYS])
@torch.no_grad()
def test_ways_to_compile(model: Any, graphs: Graphs, way: str) -> None:
    expected = asked(model, DynamicCache())
    step = model
    with dropflow.attach(model, HIDROP):
        pruned = asked(model, DynamicCache())
        if way == "wrapped":
            step = torch.compile(model, backend=graphs, fullgraph=True)
        elif way == "forward":
            model.forward = torch.compile(model.forward, backend=graphs)
        elif way == "in place":
            model.compile(backend=graphs)
        elif way == "layers":
            for layer in model.get_decoder().layers:
                layer.compile(backend=graphs, dynamic=True)
        else:
            model.get_decoder().compile(backend=graphs)
        assert relative_error(asked(model, static(model), step), pruned) < 1e-5
        assert relative_error(asked(model, DynamicCache(), inputs=prompt()), pruned) < 1e-5
    assert graphs.made
    assert relative_error(asked(model, static(model), step), expected) < 1e-5


@torch.no_grad()
def test_compiled_steps_follow_the_policy_that_is_attached(model: Any, graphs: Graphs) -> None:
    plain = asked(model, DynamicCache())
    step = torch.compile(model, backend=graphs, fullgraph=True)
    for which in (None, HIDROP, FASTV, None):
        if which is None:
            assert relative_error(asked(model, static(model), step), plain) < 1e-5
            continue
        with dropflow.attach(model, which):
            expected = asked(model, DynamicCache())
            assert relative_error(expected, plain) > 1e-3
            assert relative_error(asked(model, static(model), step), expected) < 1e-5


@torch.no_grad()
def test_a_cache_of_another_policy_is_refused_by_compiled_steps(model: Any, graphs: Graphs) -> None:
    step, token = torch.compile(model, backend=graphs), torch.tensor([[5], [6], [7]])
    caches = {"hidrop": static(model), "fastv": static(model)}
    with dropflow.attach(model, FASTV):
        model(**prompt(), **{CACHE_ARGUMENT: caches["fastv"]})
    with dropflow.attach(model, HIDROP):
        asked(model, caches["hidrop"], step, count=1)
    with dropflow.attach(model, HIDROP):
        asked(model, static(model), step, count=2)
        with pytest.raises(UnsupportedCall, match="written under another policy"):
            step(input_ids=token, **{CACHE_ARGUMENT: caches["fastv"]})
        # of an earlier attachment of the same policy: served, though not by compiled code
        twin = deepcopy(caches["hidrop"])
        expected = model(input_ids=token, **{CACHE_ARGUMENT: twin}).logits
        assert relative_error(step(input_ids=token, **{CACHE_ARGUMENT: caches["hidrop"]}).logits, expected) < 1e-5
    with pytest.raises(UnsupportedCall, match="written under a policy"):
        model(input_ids=token, **{CACHE_ARGUMENT: caches["fastv"]})


@torch.no_grad()
def test_compiled_code_without_the_policy_refuses_its_caches(model: Any, graphs: Graphs) -> None:
    """Even where so little was dropped that layers have the size that was asked of the cache."""
    token, other = torch.tensor([[5], [6], [7]]), tiny_llava(layers=3, seed=3)
    options: dict[str, Any] = {**TOKENS, "disable_compile": True}
    with mock.patch.object(static_layers, "STRIDE", 64):
        with dropflow.attach(model, HIDROP):
            cache, answered = static(model), static(model)
            model(**prompt(), **{CACHE_ARGUMENT: cache})
            assert {layer.keys.shape[-2] for layer in cache.layers} == {64}
            words = model.generate(**prompt(), **options, **{CACHE_ARGUMENT: answered})
            with pytest.raises(UnsupportedCall, match="written under a policy"):
                torch.compile(other, backend=graphs)(input_ids=token, **{CACHE_ARGUMENT: cache})
        with pytest.raises(UnsupportedCall, match="written under a policy"):
            torch.compile(model, backend=graphs)(input_ids=token, **{CACHE_ARGUMENT: cache})
        with pytest.raises(UnsupportedCall, match="written under a policy"):
            model.generate(input_ids=torch.cat((words, token), 1), **options, **{CACHE_ARGUMENT: answered})


@torch.no_grad()
def test_steps_on_a_copied_cache_are_compiled_too(model: Any, graphs: Graphs) -> None:
    step, token = torch.compile(model, backend=graphs, fullgraph=True), torch.tensor([[5], [6], [7]])
    with dropflow.attach(model, FASTV | {"positions": "compact"}):
        cache, dynamic = static(model), DynamicCache()
        for one in (cache, dynamic):
            model(**prompt(), **{CACHE_ARGUMENT: one})
        copied, pickled = deepcopy(cache), pickle.loads(pickle.dumps(cache))
        expected = model(input_ids=token, **{CACHE_ARGUMENT: dynamic}).logits
        for one, call in ((copied, step), (pickled, model), (cache, step)):
            assert relative_error(call(input_ids=token, **{CACHE_ARGUMENT: one}).logits, expected) < 1e-5
        assert graphs.made == 1


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_masks_with_columns_for_tokens_to_come(model: Any, side: str) -> None:
    inputs = prompt(side=side)
    wide = inputs | {"attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 20))}
    words, mask = torch.tensor([[5, 9], [6, 8], [0, 7]]), inputs["attention_mask"]
    mask = torch.cat((mask, (words > 0).to(mask)), 1)
    with dropflow.attach(model, FASTV | {"positions": "compact"}) as flow:
        for room in (DynamicCache(), static(model, inputs["input_ids"].shape[1] + 20)):
            cache = DynamicCache()
            expected = model(**inputs, **{CACHE_ARGUMENT: cache}).logits[mask[:, :-2].bool()]
            told = str(flow.report())
            found = model(**wide, **{CACHE_ARGUMENT: room}).logits[mask[:, :-2].bool()]
            assert str(flow.report()) == told
            assert relative_error(found, expected) < 1e-5
            turn = model(input_ids=words, attention_mask=mask, **{CACHE_ARGUMENT: cache}).logits
            wider = torch.nn.functional.pad(mask, (0, 18))
            found = model(input_ids=words, attention_mask=wider, **{CACHE_ARGUMENT: room}).logits
            assert relative_error(found[words > 0], turn[words > 0]) < 1e-5


@torch.no_grad()
def test_of_several_policies_the_chosen_one_answers(model: Any, graphs: Graphs) -> None:
    step = torch.compile(model, backend=graphs)
    with dropflow.attach_set(model, {"one": HIDROP, "other": FASTV}, default="one") as flows:
        for name in ("one", "other", "one"):
            with flows.using(name):
                assert relative_error(asked(model, static(model), step), asked(model, DynamicCache())) < 1e-5


@torch.no_grad()
def test_eager_and_compiled_steps_take_turns(model: Any, graphs: Graphs) -> None:
    step = torch.compile(model, backend=graphs, fullgraph=True)
    turns = iter([step, model, step, step])
    with dropflow.attach(model, HIDROP) as flow:
        expected, told = asked(model, DynamicCache()), str(flow.report())
        cache = static(model)
        found = asked(model, cache, lambda **inputs: next(turns)(**inputs))
        assert relative_error(found, expected) < 1e-5
        assert str(flow.report()) == told


@torch.no_grad()
def test_further_turns_and_images_on_a_static_cache(model: Any, graphs: Graphs) -> None:
    step = torch.compile(model, backend=graphs, fullgraph=True)
    first, words, more = prompt(((3, "I", 5),)), torch.tensor([[5, 9, 4]]), prompt(((2, "I", 1),), seed=5)
    logits = []
    with dropflow.attach(model, FASTV | {"positions": "compact"}):
        for cache, call in ((DynamicCache(), model), (static(model, 96), step)):
            model(**first, **{CACHE_ARGUMENT: cache})
            told = [call(input_ids=words[:, :1], **{CACHE_ARGUMENT: cache}).logits]
            told.append(model(input_ids=words, **{CACHE_ARGUMENT: cache}).logits)
            told.append(call(input_ids=words[:, 1:2], **{CACHE_ARGUMENT: cache}).logits)
            told.append(model(**more, **{CACHE_ARGUMENT: cache}).logits)
            told.append(call(input_ids=words[:, :1], **{CACHE_ARGUMENT: cache}).logits)
            logits.append(torch.cat(told, 1))
    assert relative_error(*logits) < 1e-5


@pytest.mark.parametrize("which", ["hidrop", "compact"])
@torch.no_grad()
def test_beams_and_chunks_on_a_static_cache(model: Any, graphs: Graphs, which: str) -> None:  # noqa: ARG001
    ways: list[dict[str, Any]] = [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
    if CHUNKS_IMAGES:
        ways.append({"prefill_chunk_size": 7})
    with dropflow.attach(model, POLICIES[which]):
        for options in ways:
            expected = model.generate(**prompt(), **(TOKENS | options))
            found = model.generate(
                **prompt(), **(TOKENS | options), cache_implementation="static", disable_compile=True
            )
            assert torch.equal(found, expected)


@torch.no_grad()
def test_an_emptied_static_cache_serves_again(model: Any, graphs: Graphs) -> None:
    step = torch.compile(model, backend=graphs, fullgraph=True)
    with dropflow.attach(model, HIDROP):
        cache = static(model)
        first = asked(model, cache, step)
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        assert torch.equal(asked(model, cache, step), first)


@torch.no_grad()
def test_a_full_cache_says_so_and_stays_as_it_is(model: Any, graphs: Graphs) -> None:  # noqa: ARG001
    inputs = prompt(((3, "I", 5),))
    length, token = inputs["input_ids"].shape[1], torch.tensor([[5]])
    for stride in (1, 64):  # with a stride, layers have more room than the cache may use
        with mock.patch.object(static_layers, "STRIDE", stride), dropflow.attach(model, HIDROP):
            with pytest.raises(UnsupportedCall, match=rf"static cache of {length - 1} tokens cannot hold {length}"):
                model(**inputs, **{CACHE_ARGUMENT: static(model, length - 1)})
            cache = static(model, length + 1)
            model(**inputs, **{CACHE_ARGUMENT: cache})
            model(input_ids=token, **{CACHE_ARGUMENT: cache})
            with pytest.raises(UnsupportedCall, match=f"static cache of {length + 1} tokens is full"):
                model(input_ids=token, **{CACHE_ARGUMENT: cache})
            assert int(cache.get_seq_length()) == length + 1
            cache = static(model, length + 2)
            model(**inputs, **{CACHE_ARGUMENT: cache})
            with pytest.raises(UnsupportedCall, match=f"static cache of {length + 2} tokens cannot hold {length + 3}"):
                model(input_ids=token.expand(1, 3), **{CACHE_ARGUMENT: cache})
            assert int(cache.get_seq_length()) == length
            assert all(isinstance(layer, StaticFlowLayer) for layer in cache.layers)


@torch.no_grad()
def test_static_caches_keep_their_size_and_layers(model: Any) -> None:
    with dropflow.attach(model, HIDROP):
        short = StaticCache(tiny_llava(layers=2).config.get_text_config(), max_cache_len=64)
        with pytest.raises(UnsupportedModel, match="a static cache of 2 layers lacks 1"):
            model(**prompt(), **{CACHE_ARGUMENT: short})
        cache = static(model)
        model(**prompt(), **{CACHE_ARGUMENT: cache})
        twin, token = deepcopy(cache), torch.tensor([[5], [6], [7]])
        for name, given in (("crop", -4), ("batch_select_indices", token[0]), ("batch_repeat_interleave", 2)):
            with pytest.raises(UnsupportedCall, match=f"{name} would change the size of a static cache"):
                getattr(cache, name)(given)
        after = [model(input_ids=token, **{CACHE_ARGUMENT: one}).logits for one in (cache, twin)]
        assert torch.equal(*after)


@pytest.mark.parametrize(
    ("which", "why"),
    [
        (FASTV | {"recall": True}, "later turns recall dropped tokens"),
        (
            policy(cache={"use": "mustdrop/output-aware-cache", "at": 2, "threshold": 0.01, "interval": 3}),
            r"stages\.cache evicts",
        ),
        (policy(read={"use": "visionpulse/decode-read", "at": 1}), r"stages\.read chooses at every step"),
    ],
    ids=["recall", "evicts", "reads"],
)
@torch.no_grad()
def test_what_changes_caches_later_is_refused(model: Any, which: Any, why: str) -> None:
    with dropflow.attach(model, which):
        expected = model(**prompt()).logits
        with pytest.raises(UnsupportedModel, match=rf"static cache does not go with this policy.*{why}"):
            model(**prompt(), **{CACHE_ARGUMENT: static(model)})
        assert torch.equal(model(**prompt()).logits, expected)


@pytest.mark.slow
@torch.no_grad()
def test_threads_answer_side_by_side(model: Any, graphs: Graphs) -> None:
    found: dict[int, Tensor] = {}
    with dropflow.attach(model, HIDROP):
        step = torch.compile(model, backend=graphs)
        expected = [asked(model, DynamicCache(), inputs=prompt(seed=seed)) for seed in range(3)]
        asked(model, static(model), step)

        def answer(seed: int) -> None:
            with torch.no_grad():
                found[seed] = asked(model, static(model), step, prompt(seed=seed), count=4)

        threads = [threading.Thread(target=answer, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed, own in enumerate(expected):
        assert relative_error(found[seed], own) < 1e-5


HYBRID = ("lfm2_vl", "lfm3_vl", "minicpmv4_6", "qwen3_5", "qwen3_5_moe")
"""Families whose first layers have no attention."""
UNCOMPARED = ("gemma3n", "gemma4", "gemma4_unified")
"""Families that static caches are refused on, or that do not compile whole without a policy either."""
FAMILIES = [
    name if name == "qwen2_5_vl" else pytest.param(name, marks=pytest.mark.slow)
    for name in tiny_models()
    if name != "llava"
]


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_steps_generate_the_same_tokens_on_other_families(family: str) -> None:
    adapter, tiny = tiny_models()[family]
    rank = {"use": "fastv/attention-rank", "at": 5 if family in HYBRID else 1, "keep": 0.4}
    compared = check_compiled_steps(Case(family, adapter, tiny, policy(rank=rank)))
    assert compared == (0 if family in UNCOMPARED else 12)  # four tokens of three samples


BREAKS = [pytest.param(place, marks=pytest.mark.slow) for place in ("embeddings", "both")]


@pytest.mark.parametrize("place", ["layer", *BREAKS])
@torch.no_grad()
def test_graphs_that_break_give_the_same_answers(model: Any, graphs: Graphs, place: str) -> None:
    text = model.get_decoder()
    broken = {"layer": [text.layers[1].mlp], "embeddings": [text.embed_tokens]}
    for part in broken.get(place, [one for parts in broken.values() for one in parts]):
        forward = part.forward

        def breaks(*args: Any, own: Any = forward, **kwargs: Any) -> Any:
            torch._dynamo.graph_break()
            return own(*args, **kwargs)

        part.forward = breaks
    step = torch.compile(model, backend=graphs)
    with dropflow.attach(model, FASTV):
        assert relative_error(asked(model, static(model), step), asked(model, DynamicCache())) < 1e-5
        assert graphs.made > 2
        with (
            pytest.raises(RuntimeError, match="out of memory"),
            mock.patch.object(text.layers[2].mlp.act_fn, "forward", side_effect=RuntimeError("out of memory")),
        ):
            asked(model, static(model), step)
        assert relative_error(asked(model, static(model), step), asked(model, DynamicCache())) < 1e-5
    assert relative_error(asked(model, static(model), step), asked(model, DynamicCache())) < 1e-5
