"""Finished measurements: found again under the same facts only."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dropflow
from dropflow_lab.compare.store import Finished, digest_of_code, digest_of_weights
from dropflow_lab.digits.checkpoints.model import build_model


def test_a_measurement_is_found_under_its_own_facts(tmp_path: Path) -> None:
    finished = Finished(tmp_path / "runs")
    assert finished.read("a", {"x": 1}) is None
    finished.write("a", {"x": 1, "y": [2]}, {"value": 3})
    assert finished.read("a", {"y": [2], "x": 1}) == {"value": 3}
    assert finished.read("a", {"x": 2, "y": [2]}) is None
    assert finished.read("b", {"x": 1, "y": [2]}) is None
    assert [path.suffix for path in (tmp_path / "runs").iterdir()] == [".json"]


def test_changed_code_of_a_stage_is_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from dropflow import Stage, StageOptions\n"
        "class Empty(Stage[StageOptions]):\n    Options = StageOptions\n    summary = 'does nothing'\n"
    )
    module = tmp_path / "made_for_digests.py"
    module.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    made: Any = __import__("made_for_digests")
    policy = dropflow.load_policy({"name": "p", "stages": {"s": {"use": made.Empty}}})
    before = digest_of_code(policy)
    assert digest_of_code(policy) == before != digest_of_code(None)
    module.write_text(source + "# changed\n")
    assert digest_of_code(policy) != before
    del sys.modules["made_for_digests"]


def test_the_weights_digest_sees_one_changed_number() -> None:
    model = build_model(0, decoder_layers=2)
    other = copy.deepcopy(model)
    before = digest_of_weights(model)
    assert before == digest_of_weights(other)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1
    assert digest_of_weights(other) != before
