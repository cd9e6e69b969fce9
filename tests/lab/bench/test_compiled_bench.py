"""The benchmark of compiled decode steps on a model of toy size."""

from __future__ import annotations

import json
import time

import pytest

from dropflow_lab.bench import compiled_steps
from dropflow_lab.bench.random_llava import SubjectShape
from dropflow_lab.measure.machine import torch_threads

TOY = SubjectShape(layers=12, hidden=32, intermediate=64, heads=2, image_side=24, text_tokens=8, vocabulary=32)


def test_steps_are_one_graph_on_layers_of_their_own_size(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch_threads(2):
        measured = compiled_steps.bench_compiled(
            TOY, backend="eager", rounds=2, decode_steps=2, threads=1, clock=time.process_time
        )
    asked: list[SubjectShape] = []
    monkeypatch.setattr(compiled_steps, "bench_compiled", lambda shape, **_: asked.append(shape) or measured)
    told = json.loads(cli("bench", "compiled", "--visual-tokens", 1024, "--json").stdout)
    assert asked[0].visual_tokens == 1024
    assert told["graphs"] == 1
    assert told["machine"]["threads"] == 1
    limit = 8 + 576 + 3 * 2 + 1
    kept = [0] * 3 + [576, 215, 10, 5, 1, 1] + [0] * 3
    assert told["capacities"] == [limit - (576 - own) // 64 * 64 for own in kept]
    assert (told["clock"], told["rounds"], told["backend"]) == ("CPU time of the process", 2, "eager")
    shown = cli("bench", "compiled").stdout
    assert "compiled, hidrop-64" in shown
    assert "1 graph(s); room for entries per layer: " in shown
