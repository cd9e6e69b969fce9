"""Cost: FLOPs by counter and by formula, the cache's real bytes, and a clock that loses nothing."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dropflow
from dropflow import CacheCall, CacheKeep, Keep, PruneCall, Stage, hookimpl
from dropflow.backbone.backbone import backbone_for
from dropflow.policy import registry
from dropflow_lab.compare.cost import NEW_TOKENS, Work, measure_cost
from dropflow_lab.compare.lineup import Subject, line_up
from dropflow_lab.inputs.data import Sample, read_samples
from dropflow_lab.inputs.models import load_model
from dropflow_lab.inputs.prompts import build_inputs
from dropflow_lab.measure.selection_cost import SelectionMeter
from dropflow_lab.measure.stopwatch import Stopwatch

SHIPPED = sorted(registry.policy_files())
TOO_DEEP = {"tome-r8", "tome-r16"}  # they merge in 23 layers of the vision encoder, and this one has 4
OTHER_TOWER = {"cdpruner-64", "cdpruner-128", "anchorprune-32", "anchorprune-64", "anchorprune-128"}
"""They read the question with the CLIP that LLaVA's tower was taken from."""
NO_UNITS = {"pixelprune-documents"}  # it leaves units out of a packed tower
UNTRAINED = {"visionselector-10", "visionselector-20", "visionselector-30"}  # they need weights
UNFIT = TOO_DEEP | OTHER_TOWER | NO_UNITS | UNTRAINED


def by_stages(names: Iterable[str]) -> list[Any]:
    """The policies, those but the first with the same stages marked as slow."""
    seen: set[tuple[str, ...]] = set()
    found = []
    for name in names:
        stages = tuple(stage.use for stage in dropflow.load_policy(name, ["rescale=true"]).stages.values())
        found.append(pytest.param(name, marks=pytest.mark.slow) if stages in seen else name)
        seen.add(stages)
    return found


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[Any, Any]:
    return load_model(model_folder)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return read_samples("digits", 2)


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load_model()


@pytest.fixture(scope="module")
def dense_work(embedded: tuple[Any, Any], samples: list[Sample]) -> Work:
    return measure_cost(*embedded, None, samples[:1], rounds=0).work


def test_only_what_does_not_fit_the_embedded_model_is_left_out(embedded: tuple[Any, Any]) -> None:
    found = line_up([Subject(name) for name in SHIPPED], {"": embedded}, ["rescale=true"])
    assert set(found.refused) == UNFIT
    named = [name for entry in found.entries for name in (entry.title.policy, *entry.title.also)]
    assert sorted(named) == sorted(set(SHIPPED) - UNFIT)


@pytest.mark.parametrize("name", by_stages(sorted(set(SHIPPED) - UNFIT)))
def test_counted_flops_are_those_of_the_formula_for_every_shipped_policy(
    embedded: tuple[Any, Any], samples: list[Sample], dense_work: Work, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dropflow_lab.compare.cost.NEW_TOKENS", 2)  # decode steps and memory are not looked at
    monkeypatch.setattr("dropflow_lab.compare.cost.peak_bytes", lambda *_: 0)
    policy = dropflow.load_policy(name, ["rescale=true"])
    work = measure_cost(*embedded, policy, samples[:1], rounds=0, dense=dense_work).work
    assert work.flops_counted == pytest.approx(work.flops_formula, rel=0.01)
    assert work.flops_formula > 0


def test_work_is_what_the_report_and_the_cache_say(loaded: tuple[Any, Any], samples: list[Sample], mild: Path) -> None:
    model, processor = loaded
    policy = dropflow.load_policy(mild)
    cost = measure_cost(model, processor, policy, samples[:1], rounds=0)
    prompt = build_inputs(processor, [(samples[0].images(), samples[0].question)])
    with torch.no_grad(), dropflow.attach(model, policy) as flow:
        model(**prompt)
    report = flow.report()
    assert cost.times is None
    assert cost.work.flops_counted == cost.work.flops_formula == report.flops
    assert cost.dense.flops_counted == cost.dense.flops_formula == report.flops_dense
    assert (cost.work.kv_bytes, cost.dense.kv_bytes) == (report.kv_bytes, report.kv_bytes_dense)
    assert cost.work.flops_selection > cost.dense.flops_selection == 0
    assert cost.work.flops_vision == cost.dense.flops_vision > 0
    assert 0 < cost.work.peak_bytes < cost.dense.peak_bytes


def test_times_are_ratios_whose_parts_add_up(loaded: tuple[Any, Any], samples: list[Sample], mild: Path) -> None:
    times = measure_cost(*loaded, dropflow.load_policy(mild), samples[:1], rounds=3).times
    assert times is not None
    parts = times.parts
    shares = (parts.vision, parts.selection, parts.prefill, parts.decode)
    assert all(share > 0 for share in shares)
    assert sum(shares) == pytest.approx(parts.total)
    assert parts.total == pytest.approx(times.total.median)


def test_no_part_is_negative_and_all_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where vision and selection ran beside the rest, so that together they took longer than the first forward."""
    backbone = SimpleNamespace(model=None, core=None)
    meter = SimpleNamespace(measure=lambda run: run(), elapsed=0.0)
    watch = Stopwatch(backbone, meter)  # type: ignore[arg-type]  # stands in for both
    monkeypatch.setattr(watch, "_watched", nullcontext)

    def run() -> None:
        watch._forwards += [1.0, 0.5]
        watch._vision, watch._selection = 0.9, 0.3

    monkeypatch.setattr(watch, "_now", lambda: 0.0)
    split = watch.split(run)
    assert (split.vision, split.selection, split.prefill) == (pytest.approx(0.7), 0.3, 0.0)
    assert (split.first_token, split.total) == (1.0, 1.5)


def test_a_stretch_of_selection_within_another_counts_once(
    loaded: tuple[Any, Any], mild: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dropflow.attach(loaded[0], mild) as flow, monkeypatch.context() as patched:
        meter = SelectionMeter(flow.plan)
        ticks = itertools.count()
        patched.setattr(time, "perf_counter", lambda: float(next(ticks)))
        with meter._timed(), meter._timed("tap"):
            pass
    assert meter.elapsed == 1.0


class Evicting(Stage[Any]):
    """Keeps all in the prefill, and half of the visual entries from the second decode step on."""

    decode_every = 2

    @hookimpl
    def decode_cache(self, call: CacheCall) -> CacheKeep | None:
        if not call.step:
            return None
        return CacheKeep({view.layer: (view.image_id < 0) | (view.index % 2 == 0) for view in call.layers})


def test_what_is_evicted_while_decoding_shows_at_the_end(loaded: tuple[Any, Any], samples: list[Sample]) -> None:
    policy = dropflow.load_policy({"name": "late", "stages": {"evict": {"use": Evicting}}})
    cost = measure_cost(*loaded, policy, samples[:1], rounds=0)
    each = (cost.dense.kv_bytes_end - cost.dense.kv_bytes) / (NEW_TOKENS - 1)
    assert cost.work.kv_bytes == cost.dense.kv_bytes > 144 * each > 0
    assert cost.work.kv_bytes_end == cost.dense.kv_bytes_end - 72 * each


def test_what_steps_read_is_told_beside_what_is_held(loaded: tuple[Any, Any], samples: list[Sample]) -> None:
    read = {"use": "visionpulse/decode-read", "at": 0, "fixed": 0.25}
    policy = dropflow.load_policy({"name": "read", "stages": {"read": read}})
    whole = dropflow.load_policy({"name": "read", "stages": {"read": read | {"fixed": 1.0}}})
    cost, plain = (measure_cost(*loaded, one, samples[:1], rounds=0) for one in (policy, whole))
    each = (cost.dense.kv_bytes_end - cost.dense.kv_bytes) / (NEW_TOKENS - 1)
    assert plain.work.kv_bytes_read == pytest.approx(cost.dense.kv_bytes_read)
    assert cost.dense.kv_bytes_read == pytest.approx(cost.dense.kv_bytes + 4 * each)
    assert cost.work.kv_bytes_end == cost.dense.kv_bytes_end
    assert cost.work.kv_bytes_read == pytest.approx(cost.dense.kv_bytes_read - 0.75 * 144 * each)


def test_the_clock_gives_every_stretch_to_one_part(
    loaded: tuple[Any, Any], samples: list[Sample], mild: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that ticks at every reading, the stretches between readings add up to the whole."""
    model, processor = loaded
    backbone = backbone_for(model)
    prompt = build_inputs(processor, [(samples[0].images(), samples[0].question)])
    with dropflow.attach(model, mild) as flow, monkeypatch.context() as patched:
        meter = SelectionMeter(flow.plan)
        ticks = itertools.count()
        patched.setattr(time, "perf_counter", lambda: float(next(ticks)))
        split = Stopwatch(backbone, meter).split(
            lambda: model.generate(**prompt, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)
        )
    # one stage ranks and one exits, each a stretch of one tick; so is the vision tower, and every decode step
    assert (split.selection, split.vision, split.decode) == (2.0, 1.0, NEW_TOKENS - 1.0)
    assert split.prefill > 0
    assert split.total == split.first_token + split.decode
    assert "forward" not in backbone.text.__dict__
    assert "get_image_features" not in backbone.core.__dict__


PAUSE = 1e6
"""Ticks of the clock; far more than it is read elsewhere."""


@pytest.mark.parametrize("slow", ["tower", "stage", "decoder"])
def test_what_is_slow_is_told_where_it_is(
    loaded: tuple[Any, Any], samples: list[Sample], slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that ticks when it is read, and far on in the part that is slow."""
    now = [0.0]

    def read() -> float:
        now[0] += 1
        return now[0]

    def pause(*_: Any) -> None:
        now[0] += PAUSE

    class Ranks(Stage[Any]):
        prune_at = (1,)

        @hookimpl
        def prune(self, call: PruneCall) -> Keep:
            if slow == "stage":
                pause()
            return Keep(call.index % 2 == 0)

    model, processor = loaded
    backbone = backbone_for(model)
    prompt = build_inputs(processor, [(samples[0].images(), samples[0].question)])
    part = {"tower": backbone.core.vision_tower, "decoder": backbone.text.layers[0]}.get(slow)
    handle = None if part is None else part.register_forward_pre_hook(pause)
    try:
        policy = {"name": "test", "stages": {"ranks": {"use": Ranks}}}
        with dropflow.attach(model, policy) as flow, monkeypatch.context() as patched:
            watch = Stopwatch(backbone, SelectionMeter(flow.plan))
            patched.setattr(time, "perf_counter", read)
            started = read()
            split = watch.split(lambda: model.generate(**prompt, do_sample=False, max_new_tokens=1))
            whole = read() - started
    finally:
        if handle is not None:
            handle.remove()
    times = {"tower": split.vision, "stage": split.selection, "decoder": split.prefill}
    assert times.pop(slow) >= PAUSE
    assert all(0 < seconds < PAUSE for seconds in times.values())
    assert split.decode == 0
    assert PAUSE <= split.first_token <= whole
