"""Cost: FLOPs by counter and by formula, the cache's real bytes, and a clock that loses nothing."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import dropflow
from dropflow import Keep, PruneCall, Stage, hookimpl
from dropflow.backbone.backbone import backbone_for
from dropflow.policy import registry
from dropflow_lab.compare.compare import fitting
from dropflow_lab.compare.cost import NEW_TOKENS, measure_cost
from dropflow_lab.inputs.data import Sample, read_samples
from dropflow_lab.inputs.models import load_model
from dropflow_lab.inputs.prompts import build_inputs
from dropflow_lab.measure.selection_cost import SelectionMeter
from dropflow_lab.measure.stopwatch import Stopwatch

SHIPPED = sorted(registry.policy_files())
TOO_DEEP = {"tome-r8", "tome-r16"}  # they merge in 23 layers of the vision encoder, and this one has 4
OTHER_TOWER = {"cdpruner-64", "cdpruner-128"}  # they read the question with the CLIP that LLaVA's tower was taken from
UNFIT = TOO_DEEP | OTHER_TOWER


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[Any, Any]:
    return load_model(model_folder)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return read_samples("digits", 2)


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load_model()


def test_only_what_does_not_fit_the_embedded_model_is_left_out(embedded: tuple[Any, Any]) -> None:
    fit, refused = fitting(embedded[0], SHIPPED, ["rescale=true"])
    assert set(refused) == UNFIT
    assert len(fit) == len(SHIPPED) - len(UNFIT)


@pytest.mark.parametrize("name", sorted(set(SHIPPED) - UNFIT))
def test_counted_flops_are_those_of_the_formula_for_every_shipped_policy(
    embedded: tuple[Any, Any], samples: list[Sample], name: str
) -> None:
    policy = dropflow.load_policy(name, ["rescale=true"])
    work = measure_cost(*embedded, policy, samples[:1], rounds=0).work
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


def test_times_are_ratios_to_the_same_model(loaded: tuple[Any, Any], samples: list[Sample], mild: Path) -> None:
    times = measure_cost(*loaded, dropflow.load_policy(mild), samples[:1], rounds=2).times
    assert times is not None
    parts = [times.vision_share, times.selection_share, times.prefill_share, times.decode_share]
    assert all(part.median > 0 for part in parts)
    assert sum(part.low for part in parts) <= times.total.high + 1e-9
    assert sum(part.high for part in parts) >= times.total.low - 1e-9


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


PAUSE = 0.3
"""Seconds; far more than all else takes."""


@pytest.mark.parametrize("slow", ["tower", "stage", "decoder"])
def test_what_is_slow_is_told_where_it_is(loaded: tuple[Any, Any], samples: list[Sample], slow: str) -> None:
    def pause(*_: Any) -> None:
        time.sleep(PAUSE)

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
        with dropflow.attach(model, {"name": "test", "stages": {"ranks": {"use": Ranks}}}) as flow:
            watch = Stopwatch(backbone, SelectionMeter(flow.plan))
            started = time.perf_counter()
            split = watch.split(lambda: model.generate(**prompt, do_sample=False, max_new_tokens=1))
            whole = time.perf_counter() - started
    finally:
        if handle is not None:
            handle.remove()
    times = {"tower": split.vision, "stage": split.selection, "decoder": split.prefill}
    assert times.pop(slow) >= PAUSE
    assert all(0 < seconds < PAUSE for seconds in times.values())
    assert split.decode == 0
    assert PAUSE <= split.first_token <= whole
