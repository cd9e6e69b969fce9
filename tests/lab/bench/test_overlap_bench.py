"""The overlap benchmark on a model of toy size: what it compares, and what it leaves on the model."""

from __future__ import annotations

import threading

import pytest
import torch

from dropflow_lab.bench import overlap
from dropflow_lab.bench.overlap import OverlapBench, bench_overlap
from dropflow_lab.bench.random_llava import SubjectShape

TOY = SubjectShape(layers=16, hidden=64, intermediate=96, heads=2, image_side=12, text_tokens=16, vocabulary=32)


@pytest.fixture(scope="module")
def measured() -> OverlapBench:
    return bench_overlap(TOY, rounds=2)


def test_both_runs_give_the_same_bits(measured: OverlapBench) -> None:
    assert measured.same_bits


def test_every_number_is_a_median_between_its_quartiles(measured: OverlapBench) -> None:
    for name in ("serial_ms", "overlap_ms", "both_cores_ms", "vision_ms", "text_only_ms", "speedup"):
        spread = getattr(measured, name)
        assert 0 < spread.low <= spread.median <= spread.high


def test_the_parts_are_parts_of_the_serial_run(measured: OverlapBench) -> None:
    assert measured.vision_ms.low + measured.text_only_ms.low < 2 * measured.serial_ms.high


def test_nothing_stays_behind(measured: OverlapBench) -> None:
    assert measured.machine.threads == 1
    assert "dropflow-side-work" not in [thread.name for thread in threading.enumerate()]
    assert torch.is_grad_enabled()


def test_its_plain_data_has_the_policy(measured: OverlapBench) -> None:
    data = measured.to_json()
    assert data["policy"]["stages"]["inject"]["at"] == overlap.ENTRY
    assert data["saved_share"].keys() == {"median", "low", "high"}
