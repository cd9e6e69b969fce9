"""Traces say what happened: counts, rows, protection, scores and evictions, and their schema holds."""

from __future__ import annotations

import json
import math
from typing import Any

import jsonschema
import pytest
import torch
from lab_tracing import ENCODE, EVICTS, POLICIES, STEPS, Words, tiny_trace
from tiny import HIDROP, policy, prompt, tiny_llava
from transformers import DynamicCache

import dropflow
from dropflow import CacheSelect, Stage, StageOptions, StepCall, hookimpl
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.testing import tiny_models
from dropflow_lab.errors import InputError
from dropflow_lab.trace import Trace, page, record_inputs, replay_policy


@pytest.mark.parametrize("which", POLICIES.values(), ids=POLICIES)
@torch.no_grad()
def test_counts_are_those_of_the_report_and_of_the_real_caches(which: dict[str, Any]) -> None:
    model, inputs, trace = tiny_trace(which)
    (run,) = trace.runs
    with dropflow.attach(model, which) as flow:
        behind_prefill = DynamicCache()
        model(**inputs, **{CACHE_ARGUMENT: behind_prefill})
        out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True)
        report, live = flow.report(), flow.live()
    assert [layer.visual_tokens for layer in run.layers] == [layer.visual_tokens for layer in report.layers]
    assert run.calls[0].kv_entries == [layer.kv_entries for layer in report.layers]
    assert [layer.flops for layer in run.layers] == [layer.flops for layer in report.layers]
    assert sum(map(len, trace.entering(run))) == report.entry_visual_tokens
    assert run.calls[0].kv_entries == [layer.keys.shape[-2] for layer in behind_prefill.layers]
    assert run.calls[-1].kv_entries == [layer.keys.shape[-2] for layer in getattr(out, CACHE_ARGUMENT).layers]
    assert [call.token for call in run.calls] == out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    for boundary in run.boundaries:
        kept = [
            live[boundary.boundary, 0, image.index].nonzero()[:, 0].tolist()
            for image in trace.prompt.images
        ]  # fmt: skip
        assert boundary.kept == kept


def test_images_and_who_set_the_window() -> None:
    _, inputs, trace = tiny_trace(HIDROP)
    visual = (inputs["input_ids"][0] == 98).nonzero()[:, 0].tolist()
    assert [image.index for image in trace.prompt.images] == [visual[:16], visual[16:]]
    assert [image.grid for image in trace.prompt.images] == [(4, 4), (4, 4)]
    (run,) = trace.runs
    assert (run.entry, run.entered_by, run.exit, run.exited_by) == (1, ["inject"], 5, ["exit"])
    assert run.policy["stages"]["pyramid"]["keep"] == {"2": 7, "4": 2}


def test_merged_rows_say_what_they_are_made_of() -> None:
    *_, trace = tiny_trace(policy(**ENCODE), parts=((3, "I", 5),))
    merge, keys = trace.runs[0].encode
    assert (merge.stage, merge.boundary, keys.stage, keys.boundary) == ("merge", 1, "keys", None)
    (image,) = merge.images
    assert image.kept == list(range(10))  # 16 - 2 * 3 rows, moved to the first places
    windows = [own.of for own in image.merged or () if len(own.of) == 4]
    assert [own.into for own in image.merged or () if len(own.of) == 4] == [0, 1]
    corners = {tuple(r * 4 + c + o for o in (0, 1, 4, 5)) for r in (0, 2) for c in (0, 2)}
    assert {tuple(own) for own in windows} < corners
    alone = [own.of[0] for own in image.merged or () if len(own.of) == 1]
    assert alone == sorted(set(range(16)).difference(*windows))[-len(alone) :]
    scores = image.scores or []
    assert {scores[p] for p in windows[0]} == {max(score for score in scores if score is not None)}
    assert len(keys.images[0].protected) == 2
    best = sorted(range(10), key=lambda p: -((keys.images[0].scores or [])[p] or 0))[:2]
    assert sorted(best) == keys.images[0].protected == trace.protected(trace.runs[0])[0]
    assert all(set(keys.images[0].protected) <= set(boundary.kept[0]) for boundary in trace.runs[0].boundaries)


def test_a_cls_row_among_the_rows_and_sizes_of_several_merges() -> None:
    *_, trace = tiny_trace(POLICIES["CLS and contextual tokens"])
    (zipped,) = trace.runs[0].encode
    image = zipped.images[0]
    cls, *others = image.merged or ()
    assert (cls.into, cls.of, cls.prefix) == (0, [], [0])
    assert sorted(p for own in others for p in own.of) == list(range(16))
    assert max(len(own.of) for own in others) > 2
    for own in others:  # a dominant patch as it was, or a target plus the mean of its members
        joined = len(own.of) - 1
        weights = own.shares or [1 / len(own.of)] * len(own.of)
        assert sorted(weights, reverse=True) == pytest.approx([1.0] + [1 / joined] * joined if joined else [1.0])
    *_, trace = tiny_trace(POLICIES["merged in every layer, weighed in attention"])
    steps = trace.runs[0].encode
    assert [(step.boundary, step.proportional) for step in steps] == [(0.5, True), (2.5, True)]
    sizes: dict[int, float] = dict.fromkeys(range(16), 1.0)
    for step in steps:
        own = step.images[1]
        made = {m.into: sum(sizes[p] for p in m.of) for m in own.merged or ()}
        sizes = {p: made.get(p, sizes[p]) for p in own.kept}
        assert own.sizes == list(sizes.values())
    assert sum(sizes.values()) == 16
    assert len(sizes) == 16 - 3 - 4


def test_scores_and_who_dropped_what() -> None:
    *_, trace = tiny_trace(POLICIES["two stages at one boundary"], parts=((3, "I", 5),))
    (boundary,) = trace.runs[0].boundaries
    assert [own.stage for own in boundary.by] == ["one", "two"]
    for own in boundary.by:
        assert own.scores is not None
        ranked = sorted(range(16), key=lambda p: own.scores[0][p])  # type: ignore[index,arg-type,return-value]
        assert own.dropped == [sorted(ranked[:8])]
    both = {p for own in boundary.by for p in own.dropped[0]}
    assert boundary.kept == [sorted(set(range(16)) - both)]


def test_evictions_while_decoding() -> None:
    *_, trace = tiny_trace(policy(**EVICTS), parts=((3, "I", 5),))
    calls = trace.runs[0].calls
    assert [call.step for call in calls if call.evicted] == [0, 2]  # the prefill, and then those not attended to
    assert [(e.stage, e.layers) for e in calls[0].evicted] == [("cache", [1])]
    assert len(calls[0].evicted[0].tokens) == 16 - 9
    later = calls[2].evicted
    assert [e.layers for e in later] == [[layer] for layer in range(1, 6)]
    assert all(len(e.tokens) == len(e.notes or ()) == 9 - 4 for e in later)
    assert [b - a for a, b in zip(calls[1].kv_entries, calls[2].kv_entries, strict=True)] == [1] + [1 - 5] * 5


def test_what_decode_steps_read() -> None:
    *_, trace = tiny_trace(POLICIES["parked entries"], parts=((3, "I", 5),))
    prefill, *steps = trace.runs[0].calls
    assert prefill.read == []
    visual = [16] * 3 + [9] * 3
    for call in steps:
        assert [(read.stages, read.layers) for read in call.read] == [(["read"], [2]), (["read"], [3, 4, 5])]
        whole, held = (set(read.tokens) for read in call.read)
        assert held < whole
        assert len(whole) == 9  # of 16, 0.6 are the upper bound
        for read in call.read:
            text = call.kv_entries[read.layers[0]] - visual[read.layers[0]]
            assert read.entries == len(read.tokens) + text


class ChoosesOnce(Stage[StageOptions]):
    """Reads every other visual entry from layer 1 on, and everything again from layer 3 on."""

    decode_reads_at = (1, 3)  # type: ignore[assignment]  # a constant

    @hookimpl
    def decode_cache(self, call: StepCall) -> CacheSelect | None:
        return CacheSelect((call.visual.cumsum(1) + call.step) % 2 == 0) if call.layer == 1 else None


def test_a_choice_that_is_taken_back_in_the_same_step_is_traced_and_replayed() -> None:
    model, inputs, trace = tiny_trace(policy(read={"use": ChoosesOnce}))
    steps = trace.runs[0].calls[1:]
    assert [[(read.stages, read.layers, len(read.tokens)) for read in call.read] for call in steps] == [
        [(["read"], [1, 2], 16)]
    ] * (STEPS - 1)
    found = []
    for which in (policy(read={"use": ChoosesOnce}), replay_policy(trace)):
        with dropflow.attach(model, which) as flow, torch.no_grad():
            model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
            found.append(flow.report().kv_entries_read_over_time)
    assert found[0] == found[1]


def test_what_cannot_be_traced() -> None:
    model, two = tiny_llava(), prompt([(3, "I", 5), (3, "I", 5)])
    with pytest.raises(InputError, match="a batch of 2"):
        record_inputs(model, Words, two, [dropflow.load_policy(HIDROP)])
    assert torch.isfinite(model(**two).logits).all()


def test_the_schema_holds_and_files_are_read_back(tmp_path: Any) -> None:
    schema = Trace.model_json_schema()
    for name in (
        "compact positions",
        "eviction while decoding",
        "CLS and contextual tokens",
        "clusters inside the LLM",
    ):
        which = POLICIES[name]
        *_, trace = tiny_trace(which)
        trace.save(tmp_path / "trace.json")
        jsonschema.validate(json.loads((tmp_path / "trace.json").read_text()), schema)
        assert Trace.load(tmp_path / "trace.json") == trace


def test_faults_in_a_file_are_named(tmp_path: Any) -> None:
    *_, trace = tiny_trace(POLICIES["compact positions"])
    path = tmp_path / "trace.json"

    def complaint(change: Any) -> str:
        data = json.loads(trace.model_dump_json())
        change(data)
        path.write_text(json.dumps(data))
        with pytest.raises(InputError) as error:
            Trace.load(path)
        return str(error.value)

    shielded = trace.protected(trace.runs[0])[0][0]
    run = "runs.0"
    assert f"{run}.boundaries.1.kept.0: patch 15 was gone after boundary 2" in complaint(
        lambda data: data["runs"][0]["boundaries"][1]["kept"][0].append(15)
    )
    assert f"patch {shielded} is protected" in complaint(
        lambda data: data["runs"][0]["boundaries"][1]["kept"][0].remove(shielded)
    )
    assert f"{run}.layers: 5 entries for 6 layers" in complaint(lambda data: data["runs"][0]["layers"].pop())
    assert "format" in complaint(lambda data: data.update(format="dropflow-trace/9"))
    assert "runs.0.entry" in complaint(lambda data: data["runs"][0].pop("entry"))
    *_, trace = tiny_trace(POLICIES["clusters inside the LLM"])
    gone = next(p for p in range(16) if p not in trace.runs[0].boundaries[0].kept[0])
    assert f"{run}.boundaries.1.merged.0: patch {gone} was gone after boundary 2" in complaint(
        lambda data: data["runs"][0]["boundaries"][1]["merged"][0][0]["of"].append(gone)
    )
    assert "a share for each" in complaint(
        lambda data: data["runs"][0]["boundaries"][0]["merged"][0][0].update(shares=[1.0])
    )
    path.write_text("no json")
    with pytest.raises(InputError, match=r"trace\.json"):
        Trace.load(path)
    with pytest.raises(InputError, match="no such trace file"):
        Trace.load(tmp_path / "other.json")


def at(*path: Any, value: Any) -> Any:
    """A change of one entry of a trace file."""

    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


RUN = ("runs", 0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (at("prompt", "tokens", value=10**12), "prompt.tokens: Input should be less than or equal to 16777216"),
        (at("prompt", "tokens", value=3), "prompt.images.0: token 18, expected tokens below 3"),
        (at("prompt", "images", 0, "index", 0, value=10**12), "prompt.images.0.index.0: Input should be less"),
        (at("prompt", "images", 0, "index", 0, value=-1), "prompt.images.0.index.0: Input should be greater"),
        (at("prompt", "images", 0, "index", 0, value=5), "prompt.images.0: expected every token once, in one image"),
        (at("prompt", "images", 0, "grid", value=[10**6, 10]), "prompt.images.0.grid: 1000000 x 10 for 16 patches"),
        (at("depth", value=10**9), "depth: Input should be less"),
        (at(*RUN, "encode", 1, "shift", value=10**9), "runs.0.encode.1.shift: Input should be less"),
        (at(*RUN, "encode", 1, "shift", value=10**7), "runs.0.encode.1.shift: 10000000, but an image has 16 patches"),
        (at(*RUN, "encode", 0, "images", value=[]), "runs.0.encode.0.images: 0 entries for 1 images"),
        (at(*RUN, "encode", 0, "images", 0, "sizes", value=[1.0]), "runs.0.encode.0.images.0.sizes: 1 entries for"),
        (at(*RUN, "encode", 0, "boundary", value=math.nan), "runs.0.encode.0.boundary"),
        (at(*RUN, "policy", "stages", value=5), "runs.0.policy.stages: expected a mapping of stages"),
        (at(*RUN, "name", value="a\x1b[2J\nerror: forged"), "runs.0.name: expected a name that can be printed"),
        (at(*RUN, "layers", 0, "flops", value=math.nan), "runs.0.layers.0.flops: Input should be a finite number"),
        (at(*RUN, "entry", value=7), "runs.0: entry 7 and exit 6, expected boundaries from 0 to 6"),
        (at(*RUN, "boundaries", 0, "kept", value=[]), "runs.0.boundaries.0.kept: 0 entries for 1 images"),
        (at(*RUN, "boundaries", 0, "kept", 0, 0, value=16), "runs.0.boundaries.0.kept.0: patch 16, but the image has"),
        (at(*RUN, "boundaries", 0, "by", 0, "dropped", value=[]), "runs.0.boundaries.0.by.0.dropped: 0 entries for 1"),
        (at(*RUN, "boundaries", 0, "by", 0, "dropped", 0, value=[99]), "runs.0.boundaries.0.by.0.dropped.0: patch 99"),
        (at(*RUN, "boundaries", 0, "by", 0, "scores", value=[]), "runs.0.boundaries.0.by.0.scores: 0 entries for 1"),
        (at(*RUN, "boundaries", 0, "by", value=[]), "runs.0.boundaries.0.by: List should have at least 1 item"),
        (
            at(*RUN, "boundaries", 1, "boundary", value=2),
            "runs.0.boundaries.1: expected boundaries up to 6 that ascend",
        ),
        (at(*RUN, "calls", value=[]), "runs.0.calls: List should have at least 1 item"),
        (at(*RUN, "calls", 0, "step", value=4), "runs.0.calls.0.step: expected 0, got 4"),
        (
            at(*RUN, "calls", 0, "evicted", value=[{"stage": "s", "layers": [6], "tokens": [1]}]),
            "runs.0.calls.0.evicted.0.layers: layer 6 of 6",
        ),
        (
            at(*RUN, "calls", 0, "evicted", value=[{"stage": "s", "layers": [0], "tokens": [1], "notes": []}]),
            "runs.0.calls.0.evicted.0.notes: 0 entries for 1 tokens",
        ),
    ],
)
def test_what_nobody_traced_is_refused_when_it_is_read(hostile: Any, change: Any, expected: str) -> None:
    path, data = hostile
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError) as error:
        Trace.load(path)
    assert f"{path}: {expected}" in str(error.value)


@pytest.fixture
def hostile(tmp_path: Any) -> tuple[Any, Any]:
    """Where to write a trace that encodes and prunes at two boundaries, and its data."""
    *_, trace = tiny_trace(policy(**ENCODE), parts=((2, "I", 5),))
    return tmp_path / "trace.json", json.loads(trace.model_dump_json())


@pytest.mark.parametrize("content", ["", "[" * 100_000, '{"runs": ' * 10_000, "null", '{"depth": ' + "9" * 10_000])
def test_what_is_no_trace_is_one_line(tmp_path: Any, content: str) -> None:
    (tmp_path / "trace.json").write_text(content)
    with pytest.raises(InputError) as error:
        Trace.load(tmp_path / "trace.json")
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{tmp_path / 'trace.json'}: ") and len(line) < 500 for line in lines)
    assert len(lines) <= 10


def test_no_more_than_ten_faults_are_named(hostile: Any) -> None:
    path, data = hostile
    data["runs"][0]["layers"] = [{"visual_tokens": -1}] * 1_000
    path.write_text(json.dumps(data))
    with pytest.raises(InputError) as error:
        Trace.load(path)
    assert len(str(error.value).splitlines()) == 10


def test_a_replay_does_not_copy_the_trace_into_every_stage(hostile: Any) -> None:
    """Recording the policy of 1,000 stages would write it 1,000 times."""
    path, data = hostile
    path.write_text(json.dumps(data))
    stages = replay_policy(Trace.load(path)).to_dict()["stages"]
    assert list(stages) == ["merge", "keys", "pyramid"]
    assert all(set(stage) == {"use", "run", "stage"} for stage in stages.values())


def test_units_left_out_of_a_tower_are_told_and_left_out_again() -> None:
    tiny = tiny_models()["qwen3_vl"][1]
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 5)])
    model.generation_config.eos_token_id = None
    which = policy(
        early={"use": "control/stride", "encode": 6, "place": "pixels"},
        inside={"use": "control/random", "encode": 3, "place": 1},
    )
    trace = record_inputs(model, Words, inputs, [dropflow.load_policy(which)], STEPS)
    assert Trace.model_validate_json(trace.model_dump_json()) == trace
    early, inside = trace.runs[0].encode
    assert (early.boundary, len(early.images[0].kept), inside.boundary, len(inside.images[0].kept)) == (
        "pixels",
        6,
        1,
        3,
    )
    html = page(trace)
    assert html.count("the pixels (before the encoder ran) by early") == 2
    assert html.count("vision boundary 1 by inside") == 3
    with torch.no_grad():
        with dropflow.attach(model, which):
            expected = model(**inputs).logits
        with dropflow.attach(model, replay_policy(trace, 0)) as flow:
            assert torch.equal(model(**inputs).logits, expected)
            assert flow.report().tower_visual_tokens == pytest.approx(3 + 3 / 3, rel=1e-6)
