"""`decode_cache` stages evict entries per layer, after prefill and while decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import HIDROP, policy, prompt, relative_error, tiny_llava
from transformers import DynamicCache

import dropflow
from dropflow import CacheCall, CacheKeep, Stage, hookimpl
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.errors import DecisionError

BUDGET = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


class EvictAfterPrefill(Stage[Any]):
    """Keeps the first 3 visual entries of each sample in layers 2 and 3."""

    @hookimpl
    def decode_cache(self, call: CacheCall) -> CacheKeep:
        views = {view.layer: view for view in call.layers}
        return CacheKeep({layer: (views[layer].image_id >= 0).cumsum(1) <= 3 for layer in (2, 3)})


class EvictWhileDecoding(Stage[Any]):
    """Drops, at every second step, the visual entry of layer 1 that the newest token attends to least."""

    decode_every = 2
    taps = (1,)

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.steps: list[int] = []
        self.widths: list[int] = []

    @hookimpl
    def decode_cache(self, call: CacheCall) -> CacheKeep | None:
        self.steps.append(call.step)
        if call.step == 0:
            return None
        view = call.layers[1]
        rows = torch.zeros(len(view.index), 1, dtype=torch.long)
        weights = call.attention_rows(1, rows).mean(1)[:, 0]
        self.widths.append(weights.shape[1])
        least = weights.masked_fill(view.image_id < 0, 2.0).argmin(1, keepdim=True)
        return CacheKeep({1: torch.ones_like(view.valid).scatter(1, least, False)})


@torch.no_grad()
def test_eviction_after_prefill_equals_masking_those_keys(llava: Any) -> None:
    inputs = prompt()
    cache, reference = DynamicCache(), DynamicCache()
    token = torch.randint(3, 97, (3, 1), generator=torch.Generator().manual_seed(4))
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(token)), 1)
    with dropflow.attach(llava, policy(evict={"use": EvictAfterPrefill})):
        llava(**inputs, **{CACHE_ARGUMENT: cache})
        held = [layer.keys.shape[-2] for layer in cache.layers]
        logits = llava(input_ids=token, attention_mask=mask, **{CACHE_ARGUMENT: cache}).logits
    llava(**inputs, **{CACHE_ARGUMENT: reference})
    # the same, but hidden instead of evicted: visual entries after the third get keys that no query attends to
    visual = inputs["input_ids"] == 98
    hidden = visual & (visual.cumsum(1) > 3)
    handles = []
    for layer in (2, 3):

        def hide(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            seen = torch.nn.functional.pad(~hidden, (0, 1), value=True)
            full = kwargs["attention_mask"]
            return args, kwargs | {"attention_mask": full & seen[:, None, None, :]}

        decoder = llava.get_decoder().layers[layer]
        handles.append(decoder.register_forward_pre_hook(hide, with_kwargs=True))
    expected = llava(input_ids=token, attention_mask=mask, **{CACHE_ARGUMENT: reference}).logits
    for handle in handles:
        handle.remove()
    longest = 1 + 2 + 9 + 3  # sample 1: text and its three visual entries
    total = inputs["input_ids"].shape[1]
    assert held == [total, total, *[max(total - 16 * 2 + 3, longest)] * 2, total, total]
    assert relative_error(logits, expected) < 1e-5


@torch.no_grad()
def test_a_stage_is_asked_at_the_steps_it_names_and_sees_attention(llava: Any) -> None:
    inputs = prompt([(3, "I", 5)])
    with dropflow.attach(llava, policy(evict={"use": EvictWhileDecoding})) as flow:
        stage = flow.plan.stages[0][1]
        output = llava.generate(**inputs, **BUDGET, return_dict_in_generate=True)
    assert stage.steps == [0, 2, 4]
    lengths = [layer.keys.shape[-2] for layer in getattr(output, CACHE_ARGUMENT).layers]
    assert stage.widths == [27, 28]  # 25 of the prompt, 2 and 4 generated, one evicted in between
    assert lengths == [30, 28, 30, 30, 30, 30]


@torch.no_grad()
def test_beams_and_crops_move_the_index_with_the_entries() -> None:
    model, inputs = tiny_llava(), prompt(((3, "I", 5), (2, "I", 9)))
    both = HIDROP["stages"] | {"evict": {"use": EvictAfterPrefill}}
    with dropflow.attach(model, policy(**both)) as flow:
        beams = model.generate(**inputs, **(BUDGET | {"num_beams": 3}))
        again = model.generate(**inputs, **(BUDGET | {"num_beams": 3}))
        assert torch.equal(beams, again)
        cache = DynamicCache()
        model(**inputs, **{CACHE_ARGUMENT: cache})
        before = [layer.full_index() for layer in cache.layers]
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([2, 3, 0, 1]))
        cache.batch_select_indices(torch.tensor([0, 2]))
        for layer, index in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.index.logical, index.logical[[1, 0]])
            assert layer.keys.shape[0] == 2
        assert cache.layers[4].index is not cache.layers[5].index  # exit lies between them
        length = cache.get_seq_length()
        cache.crop(-2)
        assert cache.get_seq_length() == length - 2
        with pytest.raises(ValueError, match="only text at the end"):
            cache.crop(-12)
        assert flow.report().layers[2].visual_tokens == 7


@torch.no_grad()
def test_a_wrong_answer_is_refused(llava: Any) -> None:
    class Wrong(Stage[Any]):
        @hookimpl
        def decode_cache(self, call: CacheCall) -> CacheKeep:
            return CacheKeep({99: call.layers[0].valid})

    with (
        dropflow.attach(llava, policy(bad={"use": Wrong})),
        pytest.raises(DecisionError, match=r"layer 99, expected a layer from 0 to 5"),
    ):
        llava(**prompt(), **{CACHE_ARGUMENT: DynamicCache()})


@torch.no_grad()
def test_the_report_counts_what_is_left_behind_an_eviction(llava: Any) -> None:
    inputs, cache = prompt([(3, "I", 5)]), DynamicCache()
    with dropflow.attach(llava, policy(evict={"use": EvictAfterPrefill})) as flow:
        llava(**inputs, **{CACHE_ARGUMENT: cache})
        report = flow.report()
    held = [layer.keys.shape[2] for layer in cache.layers]
    assert held == [25, 25, 12, 12, 25, 25]
    assert [layer.kv_entries for layer in report.layers] == held
    assert report.kv_bytes == sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)
    table = str(report).splitlines()
    assert table[0] == "test: 16 visual tokens at entry to the LLM, 16.00 on average over 6 layers"
    assert table[4].split() == ["2", "16", "12", "12", f"{report.layers[2].flops:.4g}"]
    assert table[-1].endswith(f"KV bytes {report.kv_bytes:g} (dense {report.kv_bytes_dense:g})")


@torch.no_grad()
def test_images_of_a_later_turn_have_numbers_of_their_own(llava: Any) -> None:
    calls: list[CacheCall] = []

    class Looks(Stage[Any]):
        decode_every = 1

        @hookimpl
        def decode_cache(self, call: CacheCall) -> None:
            calls.append(call)

    turns, cache, mask = [prompt([("I", 2, "I", 3)]), prompt([(4, "I", 3)], seed=2)], DynamicCache(), None
    with dropflow.attach(llava, policy(looks={"use": Looks}, **HIDROP["stages"])):
        for turn in turns:
            mask = turn["attention_mask"] if mask is None else torch.cat((mask, turn["attention_mask"]), 1)
            llava(**(turn | {"attention_mask": mask}), **{CACHE_ARGUMENT: cache})
    widths = [turn["input_ids"].shape[1] for turn in turns]
    assert [(call.images, call.length) for call in calls] == [(2, widths[0]), (3, sum(widths))]
    for call, images in zip(calls, ([0, 1], [0, 1, 2]), strict=True):
        held = [view.image_id[view.valid & (view.image_id >= 0)].unique().tolist() for view in call.layers]
        assert [own for own in held if own] == [images] * 4  # vision is in layers 1 to 4
        assert all(int(view.index[view.valid].max()) == call.length - 1 for view in call.layers)
        for view in call.layers:
            first = call.layers[view.same_as]
            assert torch.equal(view.index, first.index)
            assert torch.equal(view.image_id, first.image_id)
