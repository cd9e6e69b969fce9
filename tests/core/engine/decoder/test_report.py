"""The report counts the whole prompt and what the caches hold afterwards, checked against the caches themselves."""

from __future__ import annotations

import gc
import sys
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import CHUNKS_IMAGES, HIDROP, KEEP_ALL, RAGGED, policy, prompt
from transformers import DynamicCache

import dropflow
from dropflow import CacheCall, CacheKeep, Stage, hookimpl
from dropflow.backbone import flops
from dropflow.backbone.versions import CACHE_ARGUMENT

BUDGET = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
BYTES = 2 * 2 * 8 * 4
"""Bytes of one entry: keys and values of 2 heads of 8 numbers in float32."""


class EvictAtEveryStep(Stage[Any]):
    """Drops the first remaining visual entry of each sample in layers 1 and 3."""

    decode_every = 1

    @hookimpl
    def decode_cache(self, call: CacheCall) -> CacheKeep:
        views = {layer: call.layers[layer] for layer in (1, 3)}
        return CacheKeep({layer: (view.image_id >= 0).cumsum(1) != 1 for layer, view in views.items()})


EVICTING = policy(evict={"use": EvictAtEveryStep}, **RAGGED["stages"])
OUTPUT_AWARE = policy(cache={"use": "mustdrop/output-aware-cache", "at": 2, "budget": 4, "interval": 2})


def held(cache: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[list[float], list[float]]:
    """Entries, and visual ones, of each layer's cache: real tokens by the mask, visual ones by the prompt's ids."""
    entries, visual = [], []
    for layer in cache.layers:
        found = []
        for row in range(len(ids)):
            tokens = range(layer.keys.shape[2])
            if getattr(layer, "index", None) is not None:
                index = layer.full_index()
                assert len(index) == layer.keys.shape[2]
                valid = torch.ones_like(index.logical) if index.valid is None else index.valid
                tokens = index.logical[row][valid[row].bool()].tolist()
            real = [token for token in tokens if token >= mask.shape[1] or mask[row, token]]
            found.append((len(real), sum(t < ids.shape[1] and int(ids[row, t]) == 98 for t in real)))
        entries.append(sum(all_of for all_of, _ in found) / len(ids))
        visual.append(sum(seen for _, seen in found) / len(ids))
    return entries, visual


@torch.no_grad()
def decoded(model: Any, inputs: dict[str, Any], steps: int) -> tuple[Any, list[tuple[list[float], list[float]]]]:
    """The cache, and what it held after the prefill and after every step."""
    cache, mask = DynamicCache(), inputs["attention_mask"]
    model(**inputs, **{CACHE_ARGUMENT: cache})
    moments = [held(cache, inputs["input_ids"], inputs["attention_mask"])]
    for step in range(steps):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        model(input_ids=torch.full((len(mask), 1), 5 + step), attention_mask=mask, **{CACHE_ARGUMENT: cache})
        moments.append(held(cache, inputs["input_ids"], inputs["attention_mask"]))
    return cache, moments


@pytest.mark.parametrize("which", [KEEP_ALL, HIDROP, RAGGED, EVICTING, OUTPUT_AWARE])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_answer_is_counted_as_the_caches_hold_it(llava: Any, which: Any, side: str) -> None:
    inputs, steps = prompt(side=side), 5
    with dropflow.attach(llava, which) as flow:
        cache, moments = decoded(llava, inputs, steps)
        alive = flow.report()
        del cache
        gc.collect()
        report = flow.report()
    assert alive == report
    entries, visual = zip(*moments, strict=True)
    assert report.steps == steps
    assert [row.kv_entries for row in report.layers] == pytest.approx(entries[0])
    assert [row.kv_entries_end for row in report.layers] == pytest.approx(entries[-1])
    assert [row.visual_entries_end for row in report.layers] == pytest.approx(visual[-1])
    assert report.kv_entries_over_time == pytest.approx([sum(moment) for moment in entries])
    assert report.kv_bytes == pytest.approx(sum(entries[0]) * BYTES)
    assert report.kv_bytes_end == pytest.approx(sum(entries[-1]) * BYTES)
    whole = float(inputs["attention_mask"].sum()) / 3
    assert report.kv_bytes_dense == pytest.approx(6 * whole * BYTES)
    assert report.kv_bytes_end_dense == pytest.approx(6 * (whole + steps) * BYTES)
    prefill = [row.visual_tokens for row in report.layers]
    attended = [sum(moment) / 6 for moment in (prefill, *visual[:-1])]
    assert report.average_visual_tokens_answer == pytest.approx(sum(attended) / len(attended))
    if which in (EVICTING, OUTPUT_AWARE):
        assert report.kv_bytes_end < report.kv_bytes + steps * 6 * BYTES
    else:
        assert report.kv_bytes_end == pytest.approx(report.kv_bytes + steps * 6 * BYTES)
        assert report.average_visual_tokens_answer == pytest.approx(report.average_visual_tokens)


@torch.no_grad()
def test_nothing_is_decoded_right_after_the_prefill(llava: Any) -> None:
    with dropflow.attach(llava, EVICTING) as flow:
        llava(**prompt())
        report = flow.report()
    assert (report.steps, report.kv_bytes_end, len(report.kv_entries_over_time)) == (0, report.kv_bytes, 1)
    assert report.average_visual_tokens_answer == report.average_visual_tokens


PARTS = (5, 32)
"""Where the prompt is split: text only, all images, and text with the padding of the shortest sample."""


def fed_in_parts(model: Any, inputs: dict[str, Any], cache: Any) -> list[int]:
    """Feed a prompt in three forwards onto one cache; return the number of tokens of each."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    edges = list(pairwise([0, *PARTS, ids.shape[1]]))
    for start, end in edges:
        brings = {"pixel_values": inputs["pixel_values"]} if bool((ids[:, start:end] == 98).any()) else {}
        model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], **brings, **{CACHE_ARGUMENT: cache})
    return [end - start for start, end in edges]


@pytest.mark.parametrize("which", [KEEP_ALL, HIDROP, EVICTING])
@torch.no_grad()
def test_a_prompt_fed_in_parts_is_one_prompt(llava: Any, which: Any) -> None:
    inputs = prompt(((6, "I", 25), (9, "I", 17), (5,)))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = DynamicCache()
    with dropflow.attach(llava, which) as flow:
        llava(**inputs, **{CACHE_ARGUMENT: DynamicCache()})
        whole = flow.report()
        sizes = fed_in_parts(llava, inputs, cache)
        report, live = flow.report(), flow.live()
        longer = torch.nn.functional.pad(mask, (0, 1), value=1)
        llava(input_ids=ids[:, :1], attention_mask=longer, **{CACHE_ARGUMENT: cache})
        step = flow.report()
    assert live.shape == (6, 3, ids.shape[1])
    assert report.entry_visual_tokens == pytest.approx(32 / 3)
    assert [row.visual_tokens for row in report.layers] == [row.visual_tokens for row in whole.layers]
    assert (report.kv_bytes_dense, report.steps, step.steps) == (whole.kv_bytes_dense, 0, 1)
    if which is not EVICTING:  # a stage is asked after every forward, and has evicted more often here
        entries, visual = held(cache, ids, mask)
        assert [row.kv_entries_end for row in step.layers] == pytest.approx(entries)
        assert [row.visual_entries_end for row in step.layers] == pytest.approx(visual)
        assert [row.kv_entries for row in report.layers] == pytest.approx([row.kv_entries for row in whole.layers])
    widths, work = flops.DecoderWidths.of(llava.config.text_config), 0
    for row in mask.bool():
        own = [int(part.sum()) for part in row.split(sizes)]
        work += sum(flops.layer(part, sum(own[: number + 1]), widths) for number, part in enumerate(own))
    assert report.flops_dense == pytest.approx(6 * work / 3)


@pytest.mark.skipif(not CHUNKS_IMAGES, reason="this transformers refuses images in chunks")
@pytest.mark.parametrize("chunk", [9, 21, 31])
@torch.no_grad()
def test_chunked_prefill_counts_the_whole_prompt(llava: Any, chunk: int) -> None:
    inputs = prompt([(3, "I", 12)])  # 32 tokens: a chunk of 31 leaves one for the last
    with dropflow.attach(llava, HIDROP) as flow:
        llava.generate(**inputs, **BUDGET)
        whole = flow.report()
        out = llava.generate(**inputs, **BUDGET, prefill_chunk_size=chunk, return_dict_in_generate=True)
        report, live = flow.report(), flow.live()
    assert live.shape == (6, 1, 32)
    assert report.entry_visual_tokens == 16
    assert report.steps == whole.steps == 5
    assert len(report.kv_entries_over_time) == 6
    assert report.kv_bytes_dense == whole.kv_bytes_dense
    entries, _ = held(getattr(out, CACHE_ARGUMENT), inputs["input_ids"], inputs["attention_mask"])
    assert [row.kv_entries_end for row in report.layers] == entries
    if chunk > 20:  # the image is in one chunk
        assert [row.kv_entries for row in report.layers] == [row.kv_entries for row in whole.layers]
        assert report.average_visual_tokens == whole.average_visual_tokens


@torch.no_grad()
def test_merges_of_later_parts_name_tokens_of_the_whole_prompt(llava: Any) -> None:
    which = policy(thin={"use": "mustdrop/dual-attention", "keep": {2: 8}})
    inputs = prompt([(3, "I", 5)])
    with dropflow.attach(llava, which) as flow:
        llava(**inputs)
        once = dict(flow.merges())
        cache = DynamicCache()
        llava(**inputs, **{CACHE_ARGUMENT: cache})
        more = torch.full((1, 3), 7)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
        llava(input_ids=more, attention_mask=mask, **{CACHE_ARGUMENT: cache})
        merges = flow.merges()
    assert merges.keys() == once.keys()
    for boundary, into in merges.items():
        assert torch.equal(into, torch.cat((once[boundary], torch.tensor([[25, 26, 27]])), 1))


@pytest.mark.parametrize("which", [HIDROP, EVICTING])
@torch.no_grad()
def test_every_beam_is_a_sample(llava: Any, which: Any) -> None:
    inputs = prompt()
    with dropflow.attach(llava, which) as flow:
        out = llava.generate(**inputs, **BUDGET, num_beams=3, return_dict_in_generate=True)
        report = flow.report()
    ids, mask = (inputs[name].repeat_interleave(3, 0) for name in ("input_ids", "attention_mask"))
    entries, visual = held(getattr(out, CACHE_ARGUMENT), ids, mask)
    assert [row.kv_entries_end for row in report.layers] == pytest.approx(entries)
    assert [row.visual_entries_end for row in report.layers] == pytest.approx(visual)
    assert report.kv_entries_over_time[-1] == pytest.approx(sum(entries))


@torch.no_grad()
def test_samples_that_a_caller_picks_are_those_that_count(llava: Any) -> None:
    inputs = prompt()
    with dropflow.attach(llava, RAGGED) as flow:
        cache, _ = decoded(llava, inputs, 2)
        cache.batch_select_indices(torch.tensor([1]))
        mask = torch.nn.functional.pad(inputs["attention_mask"][1:2], (0, 3), value=1)
        llava(input_ids=torch.full((1, 1), 5), attention_mask=mask, **{CACHE_ARGUMENT: cache})
        report = flow.report()
    entries, visual = held(cache, inputs["input_ids"][1:2], inputs["attention_mask"][1:2])
    assert [row.kv_entries_end for row in report.layers] == entries
    assert [row.visual_entries_end for row in report.layers] == visual
    assert report.kv_bytes_end_dense == 6 * (int(inputs["attention_mask"][1].sum()) + 3) * BYTES


@pytest.mark.parametrize("which", [KEEP_ALL, RAGGED, policy(all={"use": "control/keep-all"})])
@torch.no_grad()
def test_tokens_taken_back_are_held_no_more(llava: Any, which: Any) -> None:
    inputs = prompt()
    with dropflow.attach(llava, which) as flow:
        cache, moments = decoded(llava, inputs, 4)
        cache.crop(-3)
        report = flow.report()
    assert report.steps == 1
    assert [row.kv_entries_end for row in report.layers] == pytest.approx([n + 1 for n in moments[0][0]])
    assert report.kv_entries_over_time == pytest.approx([sum(moment) for moment, _ in moments])


@torch.no_grad()
def test_drafts_are_no_part_of_the_prompt(llava: Any) -> None:
    inputs = prompt([(6, "I", 9)])
    inputs["input_ids"][0, 1:4] = inputs["input_ids"][0, -3:]
    with dropflow.attach(llava, HIDROP) as flow:
        llava.generate(**inputs, **BUDGET)
        plain = flow.report()
        looked_up = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
        out = llava.generate(**inputs, **BUDGET, **looked_up, return_dict_in_generate=True)
        report, live = flow.report(), flow.live()
    cache = getattr(out, CACHE_ARGUMENT)
    assert live.shape[2] == inputs["input_ids"].shape[1]
    assert report.kv_bytes == plain.kv_bytes
    assert report.flops == plain.flops
    assert report.steps == cache.get_seq_length() - inputs["input_ids"].shape[1]
    assert [row.kv_entries_end for row in report.layers] == [layer.keys.shape[2] for layer in cache.layers]


@pytest.mark.parametrize("which", [KEEP_ALL, RAGGED, EVICTING])
@torch.no_grad()
def test_a_later_turn_counts_what_earlier_ones_left(llava: Any, which: Any) -> None:
    first, later = prompt([(3, "I", 5)]), prompt([(4, "I", 3)], seed=2)
    with dropflow.attach(llava, which) as flow:
        turn = llava.generate(**first, **BUDGET, return_dict_in_generate=True)
        cache = getattr(turn, CACHE_ARGUMENT)
        before = [layer.keys.shape[2] for layer in cache.layers]
        ids = torch.cat((turn.sequences, later["input_ids"]), 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": later["pixel_values"]}
        llava.generate(**inputs, **BUDGET, **{CACHE_ARGUMENT: cache})
        report, live = flow.report(), flow.live()
    own = later["input_ids"].shape[1] + 1  # the last token of the first answer is fed with the second prompt
    assert live.shape[2] == own
    assert report.entry_visual_tokens == 16
    entries, visual = held(cache, ids, torch.ones_like(ids))
    assert [row.kv_entries_end for row in report.layers] == entries
    assert [row.visual_entries_end for row in report.layers] == visual
    assert report.kv_bytes_end_dense == 6 * cache.get_seq_length() * BYTES
    if which is RAGGED:
        text = own - 16
        assert [row.kv_entries for row in report.layers] == [
            past + text + row.visual_tokens for past, row in zip(before, report.layers, strict=True)
        ]
        answer = sum(visual) / 6  # nothing is evicted: every step attends to what the end holds, and so does the prompt
        assert report.average_visual_tokens_answer == pytest.approx(answer)


@torch.no_grad()
def test_a_later_turn_of_text_follows_the_prompt(llava: Any) -> None:
    inputs, more = prompt([(3, "I", 5)]), torch.full((1, 4), 7)
    with dropflow.attach(llava, RAGGED) as flow:
        turn = llava.generate(**inputs, do_sample=False, max_new_tokens=1, return_dict_in_generate=True)
        ids, cache = torch.cat((turn.sequences, more), 1), getattr(turn, CACHE_ARGUMENT)
        llava.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **BUDGET, **{CACHE_ARGUMENT: cache})
        report = flow.report()
    assert flow.live().shape[2] == 25
    assert report.steps == 1 + 4 + 5
    assert [row.kv_entries_end for row in report.layers] == [layer.keys.shape[2] for layer in cache.layers]


@torch.no_grad()
def test_without_a_cache_nothing_is_held(llava: Any) -> None:
    inputs = prompt([(3, "I", 5)])
    with dropflow.attach(llava, HIDROP) as flow:
        llava(**inputs, use_cache=False)
        report = flow.report()
    assert [row.visual_tokens for row in report.layers] == [0, 16, 7, 7, 2, 0]
    assert [(row.kv_entries, row.kv_entries_end, row.visual_entries_end) for row in report.layers] == [(0, 0, 0)] * 6
    assert (report.kv_bytes, report.kv_bytes_dense, report.kv_bytes_end, report.kv_bytes_end_dense) == (0, 0, 0, 0)
    assert (report.steps, report.kv_entries_over_time) == (0, (0,))
    assert report.average_visual_tokens_answer == report.average_visual_tokens == 32 / 6


@torch.no_grad()
def test_conversations_and_policies_do_not_mix(llava: Any) -> None:
    inputs = prompt([(3, "I", 5)])
    first, second = DynamicCache(), DynamicCache()
    step = {"input_ids": torch.full((1, 1), 5), "attention_mask": torch.ones(1, 26, dtype=torch.long)}
    with dropflow.attach_set(llava, {"a": RAGGED, "b": HIDROP, "dense": None}, default="a") as flows:
        llava(**inputs, **{CACHE_ARGUMENT: first})
        with flows.using("b"):
            llava(**inputs, **{CACHE_ARGUMENT: second})
        with flows.using("dense"):
            llava.generate(**inputs, **BUDGET)
        llava(**step, **{CACHE_ARGUMENT: first})
        assert [flows[name].report().steps for name in "ab"] == [1, 0]
        llava(**inputs, **{CACHE_ARGUMENT: DynamicCache()})
        llava(**(step | {"attention_mask": torch.ones(1, 27, dtype=torch.long)}), **{CACHE_ARGUMENT: first})
        assert flows["a"].report().steps == 0, "another conversation was counted"


@torch.no_grad()
def test_a_report_keeps_no_cache_alive(llava: Any) -> None:
    with dropflow.attach(llava, RAGGED) as flow:
        cache, _ = decoded(llava, prompt(), 1)
        gone = weakref.ref(cache)
        del cache
        gc.collect()
        assert gone() is None
        assert flow.report().steps == 1


def test_a_report_is_shown_in_a_line_a_table_and_a_notebook(llava: Any) -> None:
    with dropflow.attach(llava, {"name": "a-policy", "stages": HIDROP["stages"]}) as flow:
        decoded(llava, prompt([(3, "I", 5)]), 2)
        report = flow.report()
    assert repr(report) == (
        "<Report of 'a-policy': 16 visual tokens at entry, 5.33 on average over 6 layers, "
        f"{report.flops / report.flops_dense:.1%} of the dense FLOPs, 60.5% of the dense KV bytes after 2 steps>"
    )
    table = str(report).splitlines()
    assert table[2:4] == [
        f"    0              0           9             11  {report.layers[0].flops:>13.4g}",
        f"    1             16          25             27  {report.layers[1].flops:>13.4g}",
    ]
    assert table[-1] == (
        f"after 2 more tokens: KV bytes {98 * BYTES} (dense {27 * 6 * BYTES}), "
        "5.33 visual tokens attended to on average"
    )
    html = report._repr_html_()
    assert "<tr><td>1</td><td>16</td><td>25</td><td>27</td>" in html
    assert table[-1] in html


def test_a_report_is_drawn(llava: Any) -> None:
    pytest.importorskip("matplotlib")
    with dropflow.attach(llava, HIDROP) as flow:
        decoded(llava, prompt([(3, "I", 5)]), 2)
        report = flow.report()
    tokens, entries = report.plot().axes
    assert [bar.get_height() for bar in tokens.patches] == [0, 16, 7, 7, 2, 0]
    assert [bar.get_height() for bar in entries.patches] == [9, 25, 16, 16, 11, 9, 11, 27, 18, 18, 13, 11]


def test_drawing_without_matplotlib_says_what_to_install(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with dropflow.attach(llava, HIDROP) as flow:
        decoded(llava, prompt([(3, "I", 5)]), 0)
        report = flow.report()
    with pytest.raises(dropflow.errors.MissingPackage, match=r"pip install 'dropflow\[figures\]'"):
        report.plot()
