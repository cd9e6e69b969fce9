"""`dropflow bench engine`, on a model of toy size."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import pytest

from dropflow_lab.bench import engine
from dropflow_lab.bench.subject import SubjectShape

TOY = SubjectShape(layers=16, hidden=32, intermediate=64, heads=2, image_side=6, text_tokens=8, vocabulary=32)


@pytest.fixture
def toy_cli(cli, monkeypatch) -> Callable[..., object]:
    monkeypatch.setattr(engine, "bench_engine", partial(engine.bench_engine, TOY, decode_steps=2))
    return cli


def test_json(toy_cli) -> None:
    result = toy_cli("bench", "engine", "--repeats", 2, "--threads", 1, "--json")
    told = json.loads(result.stdout)
    assert set(told["noop"]) == {"prefill_ratio", "decode_ratio"}
    assert set(told["reduced"]) == {"prefill_speedup", "flops_ratio", "efficiency", "kv_entries"}
    assert set(told["reduced"]["efficiency"]) == {"median", "low", "high"}
    assert set(told["machine"]) == {"cpu", "threads", "python", "torch", "transformers"}
    assert (told["rounds"], told["machine"]["threads"], len(told["reduced"]["kv_entries"])) == (2, 1, 16)


def test_table_of_a_quick_run(toy_cli) -> None:
    shown = toy_cli("bench", "engine", "--quick").stdout
    assert all(f"{name}: " in shown for name in ("noop", "empty", "control", "reduced"))
    assert "3 rounds on 1 thread(s)" in shown
