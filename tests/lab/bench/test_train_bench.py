"""The training benchmark on a model of toy size: its counts and its memory, never its times."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dropflow
from dropflow.policy.plan import resolve
from dropflow.units import BackboneShape
from dropflow_lab.bench.random_llava import SHAPES, build_batch, build_model
from dropflow_lab.bench.train import OVERRIDES, POLICY, TrainBench, bench_train
from dropflow_lab.measure.machine import torch_threads

TINY = replace(SHAPES["tiny"], batch=2)


@pytest.fixture(scope="module")
def measured() -> TrainBench:
    with torch_threads(2):
        return bench_train(TINY, rounds=2, threads=1)


def test_the_policy_keeps_the_proportions_of_hidrop_64(measured: TrainBench) -> None:
    schedule = resolve(dropflow.load_policy(POLICY, OVERRIDES), BackboneShape(16, TINY.visual_tokens)).schedule()
    assert measured.visual_tokens == schedule.per_layer
    full = resolve(dropflow.load_policy(POLICY, OVERRIDES), BackboneShape(16, 576)).schedule()
    assert full.per_layer == (0,) * 4 + (576, 215, 215, 10, 5, 1, 1, 1) + (0,) * 4
    assert full.average == 64


def test_state_is_weights_and_two_moments_of_what_is_trained(measured: TrainBench) -> None:
    model = build_model(TINY)
    tower = sum(weight.numel() for weight in model.model.vision_tower.parameters())
    every = list(model.parameters())
    trained = [weight for name, weight in model.named_parameters() if "vision_tower" not in name]
    expected = sum(w.numel() for w in every) + 2 * sum(w.numel() for w in trained) + len(trained)  # and a step count
    assert tower > 0
    assert measured.state_bytes == 4 * expected
    assert (measured.clock, measured.machine.threads) == ("cpu", 1)


def test_peaks_hold_state_and_gradients_and_fewer_tokens_need_less(measured: TrainBench) -> None:
    gradients = 4 * sum(w.numel() for name, w in build_model(TINY).named_parameters() if "vision_tower" not in name)
    assert measured.state_bytes + gradients < measured.policy_peak_bytes < measured.dense_peak_bytes
    assert measured.peak_memory_ratio == measured.dense_peak_bytes / measured.policy_peak_bytes
    assert bench_train(TINY, rounds=2, checkpointing=True).dense_peak_bytes < measured.dense_peak_bytes


def test_flops_fall_with_the_tokens(measured: TrainBench) -> None:
    tokens = TINY.text_tokens + TINY.visual_tokens
    kept = sum(TINY.text_tokens + n for n in measured.visual_tokens) / 16
    assert 0.5 * tokens / kept < measured.flops_ratio < 1.2 * tokens / kept  # the vision tower is the same in both
    assert 1 < measured.causal_flops_ratio < measured.flops_ratio  # attention is a larger share of the longer step
    assert measured.causal_efficiency.median == measured.step_speedup.median / measured.causal_flops_ratio


def test_every_sample_of_a_step_has_an_image_and_an_answer() -> None:
    batch = build_batch(TINY)
    assert batch["pixel_values"].shape[0] == batch["input_ids"].shape[0] == 2
    assert (batch["labels"] != -100).sum(1).tolist() == [2, 2]
    assert torch.equal(batch["labels"][:, -2:], batch["input_ids"][:, -2:])
