"""The engine benchmark on a model of toy size: its variants, its counts, and what it leaves on the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

import dropflow
from dropflow import load_policy
from dropflow.policy.plan import resolve
from dropflow.units import BackboneShape
from dropflow_lab.bench.engine import RAGGED, REDUCED, EngineBench, bench_engine
from dropflow_lab.bench.random_llava import SubjectShape, build_model, build_prompt, prefill_of, twin

TOY = SubjectShape(layers=16, hidden=64, intermediate=96, heads=2, image_side=12, text_tokens=16, vocabulary=32)


@pytest.fixture(scope="module")
def measured() -> Iterator[EngineBench]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield bench_engine(TOY, rounds=2, decode_steps=2)
    torch.set_num_threads(before)


def test_the_reduced_policy_removes_89_percent() -> None:
    schedule = resolve(load_policy(REDUCED), BackboneShape(16, 576)).schedule()
    assert schedule.per_layer == (0,) * 4 + (576,) + (140,) * 3 + (9,) * 3 + (0,) * 5
    assert schedule.average is not None
    assert 1 - schedule.average / 576 == pytest.approx(0.889, abs=5e-4)


def test_kv_entries_are_those_of_the_schedule(measured) -> None:
    policy = load_policy(REDUCED, ["rescale=true"])
    schedule = resolve(policy, BackboneShape(16, TOY.visual_tokens)).schedule()
    text = TOY.text_tokens
    assert list(measured.reduced.kv_entries) == [count + text for count in schedule.per_layer if count is not None]


def test_efficiency_is_speed_up_over_flops_ratio(measured) -> None:
    reduced = measured.reduced
    assert reduced.flops_ratio > 2
    assert reduced.efficiency.median == pytest.approx(reduced.prefill_speedup.median / reduced.flops_ratio)


def test_every_ratio_is_a_median_between_its_quartiles(measured) -> None:
    overheads = [measured.noop, measured.empty, measured.control]
    spreads = [spread for each in overheads for spread in (each.prefill_ratio, each.decode_ratio)]
    for spread in (*spreads, measured.ragged.decode_ratio, measured.ragged.tiny_decode_ratio, measured.attach_ms):
        assert 0 < spread.low <= spread.median <= spread.high


def test_a_ragged_batch_holds_caches_of_three_kinds() -> None:
    small = dataclasses.replace(TOY, image_side=6, text_tokens=8, batch=2)
    model, inputs = build_model(small), build_prompt(small)
    inputs["attention_mask"][1, :2] = 0
    with torch.no_grad(), dropflow.attach(model, RAGGED):
        cache = prefill_of(model, inputs)()
    held = [(layer.keys.shape[-2], layer.index.valid is not None) for layer in cache.layers]
    assert held == [(44, False)] * 5 + [(43, True)] * 3 + [(40, True)] * 8


def test_the_number_of_threads_is_set_for_the_measurement_alone(measured) -> None:
    assert measured.machine.threads == 1


def test_a_twin_shares_the_weights_and_gives_the_same_logits() -> None:
    small = dataclasses.replace(TOY, layers=2, image_side=6, text_tokens=4)
    model = build_model(small)
    other = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        first, second = (each(**build_prompt(small)).logits for each in (model, other))
    assert first.shape == (1, 40, 32)
    assert torch.equal(first, second)
