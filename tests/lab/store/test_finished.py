"""Finished measurements: found again under the same facts only."""

from __future__ import annotations

import copy
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

import dropflow
from dropflow_lab.compare.answers import Answers
from dropflow_lab.compare.compare import read_answers
from dropflow_lab.compare.cost import Cost
from dropflow_lab.digits.checkpoints.model import build_model
from dropflow_lab.store.digests import digest_of_code, digest_of_weights
from dropflow_lab.store.finished import Finished


def test_a_measurement_is_found_under_its_own_facts(tmp_path: Path) -> None:
    finished = Finished(tmp_path / "runs")
    assert finished.read("a", {"x": 1}) is None
    finished.write("a", {"x": 1, "y": [2]}, {"value": 3})
    assert finished.read("a", {"y": [2], "x": 1}) == {"value": 3}
    assert finished.read("a", {"x": 2, "y": [2]}) is None
    assert finished.read("b", {"x": 1, "y": [2]}) is None
    assert [path.suffix for path in (tmp_path / "runs").iterdir()] == [".json"]


@pytest.mark.parametrize("name", ["../../outside", "/outside", "a/b", "..", "", "x" * 300, "new\nline", "é"])
def test_no_name_leaves_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "deep" / "runs"
    finished = Finished(folder)
    finished.write(f"answers-{name}", {"x": 1}, 2)
    finished.write(name, {"x": 1}, 3)
    assert (finished.read(f"answers-{name}", {"x": 1}), finished.read(name, {"x": 1})) == (2, 3)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(folder.iterdir())
    assert finished.read("a_b", {"x": 1}) is None


@pytest.mark.parametrize("content", ["", '{"measured": [1', '{"facts": {}}', "[]", "[" * 10_000, "\udcff"])
def test_a_damaged_file_is_measured_again_and_said_so(tmp_path: Path, capsys: Any, content: str) -> None:
    finished = Finished(tmp_path)
    finished.write("a", {}, [1])
    (path,) = tmp_path.iterdir()
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert finished.read("a", {}) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: damaged, measuring again: ")


def test_a_file_of_another_shape_is_measured_again(tmp_path: Path, capsys: Any) -> None:
    finished = Finished(tmp_path)
    cost = {"work": {}, "dense": None}
    for measured, parse in ((cost, TypeAdapter(Cost).validate_python), (["a"], partial(read_answers, questions=1))):
        finished.write("a", {}, measured)
        assert finished.read("a", {}, parse) is None
    answers = Answers(("yes", "no"), 3.0, 2.5, 4.0)
    finished.write("a", {}, asdict(answers))
    assert finished.read("a", {}, partial(read_answers, questions=2)) == answers
    assert finished.read("a", {}, partial(read_answers, questions=3)) is None
    assert "2 answers to 3 questions" in capsys.readouterr().err.splitlines()[-1]


def test_a_disk_that_is_full_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = Finished(tmp_path)
    finished.write("a", {}, 1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    (path,) = tmp_path.iterdir()
    with pytest.raises(OSError, match="No space left on device") as refused:
        finished.write("a", {}, 2)
    assert refused.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [path]
    assert finished.read("a", {}) == 1


def test_changed_code_of_a_stage_is_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from dropflow import Stage, StageOptions, hookimpl\n"
        "class Empty(Stage[StageOptions]):\n    Options = StageOptions\n    summary = 'does nothing'\n"
        "    @hookimpl\n    def observe(self, event):\n        pass\n"
    )
    module = tmp_path / "made_for_digests.py"
    module.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    made: Any = __import__("made_for_digests")
    policy = dropflow.load_policy({"name": "p", "stages": {"s": {"use": made.Empty}}})
    before = digest_of_code([policy], [])
    assert digest_of_code([policy], []) == before != digest_of_code([], [])
    module.write_text(source + "# changed\n")
    assert digest_of_code([policy], []) != before
    del sys.modules["made_for_digests"]


def test_the_weights_digest_sees_one_changed_number() -> None:
    model = build_model(0, decoder_layers=2)
    other = copy.deepcopy(model)
    before = digest_of_weights(model)
    assert before == digest_of_weights(other)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1
    assert digest_of_weights(other) != before
