"""The benchmark of recall asks the same questions in every way, and tells what it found."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from dropflow_lab.bench.recall import bench_recall
from dropflow_lab.console.cli import app
from dropflow_lab.measure.machine import torch_threads


def test_every_row_asks_the_same_and_recall_alone_parks() -> None:
    with torch_threads(2):
        found = bench_recall(3, threads=1)
    assert found.machine.threads == 1
    assert [row.name for row in found.rows] == ["dense", "without recall", "recall"]
    assert {row.asked_first.asked for row in found.rows} == {3}
    without, recalled = found.rows[1:]
    assert without.asked_first == recalled.asked_first  # a first question has nothing to recall
    assert found.gain.value == recalled.asked_second.value - without.asked_second.value
    # 144 states and embeddings of 128 numbers, q of one layer, cos and sin of 32 numbers for later layers
    assert found.parked_bytes > 144 * 128 * 3 * 4


def test_the_command_prints_plain_data() -> None:
    result = CliRunner().invoke(app, ["bench", "recall", "--questions", "2", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["questions"] == 2
