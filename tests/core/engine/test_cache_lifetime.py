"""What callers do to a cache between two calls: emptied, cropped or copied, it answers and counts as a fresh one."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lossless import quantized
from tiny import HIDROP, KEEP_ALL, RAGGED, policy, prompt, relative_error
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

import dropflow
from dropflow import CacheCall, CacheKeep, Stage, hookimpl
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.tokens.cache_layers import FlowLayer, UniformLayer
from dropflow.engine.tokens.static_layers import StaticFlowLayer
from dropflow.errors import UnsupportedCall
from dropflow.testing import tiny_models

ENCODES = policy(few={"use": "divprune/max-min", "keep": 6})
PLAIN = policy(all={"use": "control/keep-all"})
"""Under which the layers of a cache stay transformers' own."""
POLICIES = {"plain": PLAIN, "keeps all": KEEP_ALL, "hidrop": HIDROP, "encode": ENCODES}
CACHES: dict[str, Callable[[Any], Cache]] = {
    "dynamic": lambda _: DynamicCache(),
    "dynamic by config": lambda text: DynamicCache(config=text),
    "static": lambda text: StaticCache(text, max_cache_len=96),
}
BYTES = 2 * 2 * 8 * 4
"""Bytes of one entry: keys and values of 2 heads of 8 numbers in float32."""
FIRST, SECOND = prompt(((3, "I", 5),)), prompt(((2, "I", 3),), seed=7)


def fresh(model: Any, kind: str) -> Cache:
    return CACHES[kind](model.config.get_text_config(decoder=True))


@torch.no_grad()
def fed(model: Any, cache: Cache, *inputs: dict[str, Any] | int) -> list[Tensor]:
    """The logits of calls on a cache, one after the other; a number stands for a call of that many text tokens."""
    calls = [words(given) if isinstance(given, int) else given for given in inputs]
    return [model(**given, **{CACHE_ARGUMENT: cache}).logits for given in calls]


def words(count: int, first: int = 5) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(count)[None] * 7 % 60 + first}


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and max(map(relative_error, found, expected)) < 1e-5


# Emptied


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("which", POLICIES)
@pytest.mark.parametrize("asked", [True, False], ids=["asked", "not asked"])
def test_an_emptied_cache_takes_a_new_prompt_as_a_fresh_one(llava: Any, which: str, kind: str, asked: bool) -> None:
    with dropflow.attach(llava, POLICIES[which]) as flow:
        expected = fed(llava, fresh(llava, kind), SECOND, 1, 3)
        report = flow.report()
        cache = fresh(llava, kind)
        fed(llava, cache, FIRST, 1)
        before = flow.report()
        cache.reset()
        assert not asked or flow.report() == before
        assert equal(fed(llava, cache, SECOND, 1, 3), expected)
        assert flow.report() == report
        assert (before.steps, report.steps) == (1, 4)


AFTERWARDS: dict[str, tuple[int, ...]] = {"single tokens": (1, 1, 1), "a short text": (4, 1), "a long text": (40, 1, 3)}


@pytest.mark.parametrize("after", AFTERWARDS)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("which", POLICIES)
def test_text_on_an_emptied_cache_is_no_part_of_the_last_answer(llava: Any, which: str, kind: str, after: str) -> None:
    with dropflow.attach(llava, POLICIES[which]) as flow:
        expected = fed(llava, fresh(llava, kind), *AFTERWARDS[after], SECOND, 1)
        whole = flow.report()
        cache = fresh(llava, kind)
        fed(llava, cache, FIRST, 1)
        report = flow.report()
        cache.reset()
        found = fed(llava, cache, *AFTERWARDS[after])
        assert flow.report() == report
        assert equal(found + fed(llava, cache, SECOND, 1), expected)
        assert flow.report() == whole
    assert report.kv_bytes_end == report.kv_bytes + 6 * BYTES
    assert min(row.visual_entries_end for row in report.layers) >= 0


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("which", POLICIES)
def test_an_emptied_cache_serves_the_plain_model_and_other_policies(llava: Any, which: str, kind: str) -> None:
    plain = fed(llava, fresh(llava, kind), 4, FIRST, 1)
    with dropflow.attach(llava, RAGGED) as flow:
        other = fed(llava, fresh(llava, kind), 4, FIRST, 1)
        report = flow.report()
    with dropflow.attach(llava, POLICIES[which]) as flow:
        cache = fresh(llava, kind)
        fed(llava, cache, SECOND, 1)
        before = flow.report()
    cache.reset()
    assert equal(fed(llava, cache, 4, FIRST, 1), plain)
    if which != "plain":  # its layers are transformers' own, which tell nothing of it
        assert flow.report() == before
    cache.reset()
    with dropflow.attach(llava, RAGGED) as flow:
        assert equal(fed(llava, cache, 4, FIRST, 1), other)
        assert flow.report() == report
    cache.reset()
    with dropflow.attach_set(llava, {"none": None, "some": POLICIES[which]}, default="none"):
        assert equal(fed(llava, cache, 4, FIRST, 1), plain)


def test_padding_that_an_emptied_cache_got_without_a_policy_is_known_to_the_next_one(llava: Any) -> None:
    ids, mask = torch.full((2, 6), 7), torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    text = {"input_ids": ids, "attention_mask": mask}
    more = prompt([(3, "I", 5)] * 2)
    more["attention_mask"] = torch.cat((mask, more["attention_mask"]), 1)
    step = {"input_ids": ids[:, :1], "attention_mask": torch.nn.functional.pad(more["attention_mask"], (0, 1), value=1)}
    with dropflow.attach(llava, HIDROP) as flow:
        expected = fed(llava, DynamicCache(), text, more, step)
        report = flow.report()
        cache = DynamicCache()
        fed(llava, cache, more | {"attention_mask": torch.ones_like(more["input_ids"])})
    cache.reset()
    found = fed(llava, cache, text)
    with dropflow.attach(llava, HIDROP) as flow:
        assert equal(found + fed(llava, cache, more, step), expected)
        assert [row.kv_entries_end for row in flow.report().layers] == [row.kv_entries_end for row in report.layers]


@pytest.mark.parametrize("which", [HIDROP, ENCODES])
def test_a_cache_that_was_not_emptied_is_still_refused_without_its_policy(llava: Any, which: Any) -> None:
    for kind in CACHES:
        with dropflow.attach(llava, which):
            cache = fresh(llava, kind)
            fed(llava, cache, FIRST)
        with pytest.raises(UnsupportedCall, match="written under a policy"):
            fed(llava, cache, 1)
        with dropflow.attach(llava, RAGGED), pytest.raises(UnsupportedCall, match="written under another policy"):
            fed(llava, cache, 1)


def test_static_layers_tell_their_limit_before_and_after(llava: Any) -> None:
    cache = fresh(llava, "static")
    with dropflow.attach(llava, HIDROP):
        for _ in range(2):
            fed(llava, cache, FIRST, 1)
            assert all(type(layer) is StaticFlowLayer for layer in cache.layers)
            assert [layer.max_cache_len for layer in cache.layers] == [96] * 6
            assert (cache.get_max_length(), cache.is_compileable, int(cache.get_seq_length())) == (96, True, 26)
            cache.reset()
            assert (cache.get_max_length(), cache.is_compileable, int(cache.get_seq_length())) == (96, True, 0)


FAMILIES = {"gemma3": ("dynamic", "dynamic by config", "static"), "lfm2_vl": ("dynamic by config", "static")}
"""With sliding windows, and with convolutions instead of attention in some layers."""


@pytest.mark.parametrize(("family", "kind"), [(name, kind) for name, kinds in FAMILIES.items() for kind in kinds])
def test_emptied_caches_of_other_layer_kinds(family: str, kind: str) -> None:
    adapter, tiny = tiny_models()[family]
    model = tiny.model("sdpa")
    first, second = (tiny.prompt([parts], side="left")[0] for parts in ((3, "I", 5), (2, "I", 3)))
    plain = fed(model, fresh(model, kind), second, 1)
    with dropflow.attach(model, HIDROP, adapter=adapter) as flow:
        expected = fed(model, fresh(model, kind), second, 1)
        report = flow.report()
        cache = fresh(model, kind)
        fed(model, cache, first, 1)
        before = flow.report()
        cache.reset()
        fed(model, cache, 4)
        assert flow.report() == before
        cache.reset()
        assert equal(fed(model, cache, second, 1), expected)
        assert flow.report() == report
    cache.reset()
    assert equal(fed(model, cache, second, 1), plain)


def test_an_emptied_quantized_cache_and_what_cannot_be_taken_out_of_one(llava: Any) -> None:
    cache = quantized()
    plain = fed(llava, DynamicCache(), FIRST, 1)
    with dropflow.attach(llava, ENCODES):
        fed(llava, cache, FIRST, 1)
        for act in (
            lambda: cache.crop(-1),
            lambda: cache.batch_select_indices(torch.tensor([0])),
            lambda: cache.batch_repeat_interleave(2),
        ):
            with pytest.raises(UnsupportedCall, match="not supported by layers of type Lossless"):
                act()
        expected = fed(llava, DynamicCache(), FIRST, 1, 1)[2:]
        assert equal(fed(llava, cache, 1), expected)
        cache.reset()
        assert all(type(layer) is UniformLayer for layer in cache.layers)
    assert equal(fed(llava, cache, FIRST, 1), plain)
    cache.reset()
    with dropflow.attach(llava, policy(few={"use": "divprune/max-min", "keep": 3})) as flow:
        fed(llava, cache, FIRST)
        assert [row.kv_entries for row in flow.report().layers] == [12] * 6
    cache.reset()
    with (
        dropflow.attach(llava, HIDROP),
        pytest.raises(dropflow.errors.UnsupportedModel, match="type Lossless cannot hold"),
    ):
        fed(llava, cache, FIRST)


# Cropped


def shortened(inputs: dict[str, Any], by: int) -> dict[str, Any]:
    """A prompt without its last tokens."""
    return inputs | {name: inputs[name][:, :-by] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("which", POLICIES)
def test_rejected_tokens_leave_no_trace(llava: Any, which: str) -> None:
    with dropflow.attach(llava, POLICIES[which]) as flow:
        expected = fed(llava, DynamicCache(), FIRST, 1, words(1, 9), words(3, 11))
        report = flow.report()
        cache = DynamicCache()
        fed(llava, cache, FIRST, 1, words(1, 70), words(1, 71))
        cache.crop(-2)
        assert flow.report().kv_bytes_end == report.kv_bytes_end - 4 * 6 * BYTES
        assert equal(fed(llava, cache, words(1, 9), words(3, 11)), expected[2:])
        found = flow.report()
    assert [row.kv_entries_end for row in found.layers] == [row.kv_entries_end for row in report.layers]
    assert (found.steps, found.kv_bytes_end_dense) == (report.steps, report.kv_bytes_end_dense)


@pytest.mark.parametrize("which", ["plain", "keeps all", "encode"])
def test_a_prompt_that_is_cropped_and_asked_anew_is_one_prompt(llava: Any, which: str) -> None:
    longer = prompt(((3, "I", 9),))
    with dropflow.attach(llava, POLICIES[which]) as flow:
        expected = fed(llava, DynamicCache(), shortened(longer, 5), 4, 1)
        report = flow.report()
        cache = DynamicCache()
        fed(llava, cache, longer)
        cache.crop(-5)
        cropped = flow.report()
        assert equal(fed(llava, cache, 4, 1), expected[1:])
        assert flow.report() == report
    assert (cropped.kv_bytes_end, cropped.steps) == (cropped.kv_bytes - 5 * 6 * BYTES, 0)


def test_visual_tokens_that_were_cropped_are_held_no_more(llava: Any) -> None:
    with dropflow.attach(llava, PLAIN) as flow:
        cache = DynamicCache()
        fed(llava, cache, FIRST)
        cache.crop(-8)  # five words and three visual tokens
        cropped = flow.report()
        found = fed(llava, cache, 1, 2)
        report = flow.report()
        fed(llava, cache, {**SECOND, "attention_mask": torch.ones(1, 20 + SECOND["input_ids"].shape[1])})
        later = flow.report()
    assert equal(found, fed(llava, cache_of(llava, 17), 1, 2))
    for one, entries in ((cropped, 17), (report, 20)):
        assert [(row.kv_entries_end, row.visual_entries_end) for row in one.layers] == [(entries, 13)] * 6
        assert one.kv_bytes_end == one.kv_bytes_end_dense == entries * 6 * BYTES
    assert [(row.kv_entries_end, row.visual_entries_end) for row in later.layers] == [(42, 29)] * 6


def cache_of(model: Any, tokens: int) -> Cache:
    """The first tokens of `FIRST`, as the plain model stores them."""
    cache = DynamicCache()
    fed(model, cache, FIRST)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., :tokens, :], layer.values[..., :tokens, :]
    return cache


def test_a_cache_cropped_to_before_its_last_prompt_tells_nothing_more_of_it(llava: Any) -> None:
    with dropflow.attach(llava, PLAIN) as flow:
        cache = DynamicCache()
        fed(llava, cache, 30, 1, FIRST, 1)
        before = flow.report()
        cache.crop(-28)
        assert flow.report() == before
        fed(llava, cache, 9, 1)
        assert flow.report() == before


def test_layers_that_a_refused_crop_left_uneven_are_refused(llava: Any) -> None:
    inputs = prompt(side="right")
    step = {"input_ids": torch.full((3, 1), 5)}
    with dropflow.attach(llava, RAGGED):
        cache, unused = DynamicCache(), DynamicCache()
        expected = fed(llava, unused, inputs, step)
        fed(llava, cache, inputs)
        with pytest.raises(UnsupportedCall, match="neither visual tokens nor padding"):
            cache.crop(-2)
        with pytest.raises(UnsupportedCall, match="42 tokens in layer 1, but 44 in layer 5"):
            fed(llava, cache, step)
        cache.reset()
        assert equal(fed(llava, cache, inputs, step), expected)


@torch.no_grad()
def test_a_cache_of_an_interrupted_prompt_is_refused(llava: Any) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with dropflow.attach(llava, HIDROP):
        expected, cache = fed(llava, DynamicCache(), FIRST, 1), DynamicCache()
        handle = llava.get_decoder().layers[3].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            fed(llava, cache, FIRST)
        handle.remove()
        with pytest.raises(UnsupportedCall, match="25 tokens in layer 2, but 0 in layer 5"):
            fed(llava, cache, 1)
        cache.reset()
        assert equal(fed(llava, cache, FIRST, 1), expected)


@torch.no_grad()
def test_a_cache_made_from_the_tensors_of_a_policys_is_refused(llava: Any) -> None:
    with dropflow.attach(llava, HIDROP):
        fed(llava, cache := DynamicCache(), FIRST)
        rebuilt = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
        with pytest.raises(UnsupportedCall, match="in a cache made from the tensors of another one"):
            fed(llava, rebuilt, 1)
        fed(llava, cache, 1)


def test_notes_of_entries_that_were_taken_back_are_not_those_of_later_ones() -> None:
    layer = FlowLayer()
    states = torch.randn(1, 2, 6, 8)
    layer.update(states, states)
    layer.remember("stage", torch.arange(1.0, 7.0)[None])
    layer.crop(-3)
    layer.update(states[:, :, :2], states[:, :, :2])
    notes = layer.recall("stage")
    assert notes is not None
    assert notes.tolist() == [[1, 2, 3, 0, 0]]


# Copied and picked


def reread(cache: Cache) -> Cache:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda one: pickle.loads(pickle.dumps(one)), "torch.save": reread}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_copied_cache_goes_on_by_itself(llava: Any, kind: str, way: str) -> None:
    later = {**SECOND, "attention_mask": torch.ones(1, 29 + SECOND["input_ids"].shape[1])}
    with dropflow.attach(llava, HIDROP) as flow:
        cache = fresh(llava, kind)
        fed(llava, cache, FIRST)
        copied = COPIES[way](cache)
        expected = fed(llava, cache, 1, 3, later, 1)
        report = flow.report()
        assert equal(fed(llava, copied, 1, 3, later, 1), expected)
        assert flow.report() == report
        copied.reset()
        assert equal(fed(llava, cache, 2), fed(llava, cache_after(llava, kind, later), 2))


def cache_after(model: Any, kind: str, later: dict[str, Any]) -> Cache:
    cache = fresh(model, kind)
    fed(model, cache, FIRST, 1, 3, later, 1)
    return cache


@pytest.mark.parametrize("picked", [[2, 0], torch.tensor([2, 0]), torch.tensor([True, False, True])], ids=str)
def test_samples_are_picked_as_transformers_picks_them(llava: Any, picked: Any) -> None:
    inputs = prompt()
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    step = {"input_ids": torch.tensor([[5], [6], [7]]), "attention_mask": mask}
    own = {name: value[picked] for name, value in step.items()}
    with dropflow.attach(llava, RAGGED) as flow:
        cache = DynamicCache()
        fed(llava, cache, inputs)
        expected = fed(llava, copy.deepcopy(cache), step)[0][picked]
        cache.batch_select_indices(picked)
        assert equal(fed(llava, cache, own), [expected])
        assert flow.report().kv_bytes_end_dense == 6 * BYTES * float(own["attention_mask"].sum()) / 2


# Several conversations


def test_two_conversations_on_one_model_and_one_begun_anew(llava: Any) -> None:
    with dropflow.attach(llava, HIDROP) as flow:
        alone = fed(llava, DynamicCache(), FIRST, 1, 3, 1)
        of_first = flow.report()
        again = fed(llava, DynamicCache(), SECOND, 1, 1)
        of_second = flow.report()
        one, other = DynamicCache(), DynamicCache()
        found = fed(llava, one, FIRST, 1)
        other_found = fed(llava, other, SECOND)
        found += fed(llava, one, 3)
        assert flow.report().steps == 0, "a step of another conversation was counted"
        other_found += fed(llava, other, 1)
        one.reset()
        assert flow.report().steps == 1
        assert equal(fed(llava, one, 4, 1), fed(llava, DynamicCache(), 4, 1))
        assert equal(other_found + fed(llava, other, 1), again)
        assert flow.report() == of_second
        other.reset()
        assert flow.report() == of_second
        one.reset()
        assert equal(found, alone[:3])
        assert equal(fed(llava, one, FIRST, 1, 3, 1), alone)
        fed(llava, other, 5)
        assert flow.report() == of_first


def test_conversations_in_threads_of_which_one_is_begun_anew(llava: Any) -> None:
    turns = {"first": (FIRST, 1, 3, 1), "second": (SECOND, 1, 1, 2)}
    with dropflow.attach_set(llava, {"first": HIDROP, "second": RAGGED}, default="first") as flows:
        expected, reports = {}, {}
        for name, calls in turns.items():
            with flows.using(name):
                expected[name] = fed(llava, DynamicCache(), *calls)
            reports[name] = flows[name].report()
        found: dict[str, list[Tensor]] = {}

        def talk(name: str) -> None:
            cache = DynamicCache()
            with flows.using(name):
                for _ in range(3):
                    found[name] = [one for call in turns[name] for one in fed(llava, cache, call)]
                    assert flows[name].report() == reports[name]
                    cache.reset()
                    fed(llava, cache, 2, 1)
                    assert flows[name].report() == reports[name]
                    cache.reset()

        with failing_loudly() as failures:
            threads = [threading.Thread(target=talk, args=(name,)) for name in turns]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not failures
        for name in turns:
            assert equal(found[name], expected[name])


@contextmanager
def failing_loudly() -> Iterator[list[Any]]:
    """Collects what threads raise."""
    failures: list[Any] = []
    before, threading.excepthook = threading.excepthook, failures.append
    try:
        yield failures
    finally:
        threading.excepthook = before


class EvictOne(Stage[Any]):
    """Drops the first remaining visual entry of every layer at every step."""

    decode_every = 1

    @hookimpl
    def decode_cache(self, call: CacheCall) -> CacheKeep:
        return CacheKeep({layer: (view.image_id >= 0).cumsum(1) != 1 for layer, view in enumerate(call.layers)})


def test_a_stage_that_evicts_begins_anew_on_an_emptied_cache(llava: Any) -> None:
    with dropflow.attach(llava, policy(evict={"use": EvictOne})) as flow:
        expected = fed(llava, DynamicCache(), SECOND, 1, 1)
        report, cache = flow.report(), DynamicCache()
        fed(llava, cache, FIRST, 1, 1, 1)
        cache.reset()
        assert equal(fed(llava, cache, SECOND, 1, 1), expected)
        assert flow.report() == report
    assert [row.visual_entries_end for row in report.layers] == [13] * 6
