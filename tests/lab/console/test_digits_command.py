"""`dropflow digits`: the thin layer over the functions of the embedded model's task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dropflow_lab.console.commands.digits import Split
from dropflow_lab.digits.checkpoints.model import checkpoint_path
from dropflow_lab.digits.data.glyphs import SPLITS
from dropflow_lab.digits.training.recipe import PLAIN, Recipe
from dropflow_lab.digits.training.train_change import Change


def test_the_splits_are_those_of_the_task() -> None:
    assert tuple(split.value for split in Split) == SPLITS


def test_train_passes_its_options_on(cli, monkeypatch, tmp_path) -> None:
    calls: list[tuple[Path, dict[str, Any]]] = []

    def train(out: Path, test: Any, **options: Any) -> Path:
        assert callable(test)
        print("step 1")
        calls.append((out, options))
        return out

    monkeypatch.setattr("dropflow_lab.digits.training.train.train", train)
    result = cli("digits", "train", "--out", tmp_path, "--no-resume", "--seed", 3, "--threads", 2, "--json")
    assert json.loads(result.stdout) == {"out": str(tmp_path)}
    assert "step 1" in result.stderr
    cli("digits", "train", "--out", tmp_path, "--plain")
    assert calls == [
        (tmp_path, {"seed": 3, "threads": 2, "resume": False, "recipe": Recipe()}),
        (tmp_path, {"seed": 0, "threads": 1, "resume": True, "recipe": PLAIN}),
    ]


def test_train_refuses_a_folder_with_another_run(refused, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.pt").write_bytes(b"")
    assert str(tmp_path) in refused("digits", "train", "--out", tmp_path, "--no-resume")


def test_evaluate_under_a_policy(cli, model_folder, mild) -> None:
    arguments = ("digits", "evaluate", "--questions", 10, "--seed", 1, "--model", model_folder)
    told = json.loads(cli(*arguments, "--policy", mild, "--json").stdout)
    assert (told["policy"], told["questions"], told["seed"]) == ("mild", 10, 1)
    assert told["overall"]["asked"] == sum(kind["asked"] for kind in told["kinds"].values()) == 10
    low, high = told["overall"]["interval"]
    assert 0 <= low <= told["overall"]["share"] <= high <= 1
    shown = cli(*arguments).stdout
    assert "overall" in shown
    assert "95 % interval" in shown


def test_evaluate_says_that_a_recorded_policy_does_not_count(cli, caplog) -> None:
    arguments = ("digits", "evaluate", "--questions", 2, "--model", checkpoint_path("hidrop"))
    cli(*arguments)
    told = "this model runs dense, though its config records the policy 'hidrop-digits'"
    assert [message.partition(";")[0] for message in caplog.messages] == [told]
    caplog.clear()
    cli(*arguments, "--policy", "hidrop-digits")
    assert caplog.messages == []


def test_evaluate_checks_the_policy_against_the_model(refused, model_folder) -> None:
    assert "rescale" in refused("digits", "evaluate", "--model", model_folder, "--policy", "hidrop-64")


def test_an_override_needs_a_policy(refused) -> None:
    assert "--policy" in refused("digits", "evaluate", "--set", "stages.exit.at=3")


def test_sample_writes_pictures_with_questions(cli, tmp_path) -> None:
    told = json.loads(cli("digits", "sample", "--out", tmp_path, "--questions", 3, "--json").stdout)
    rows = [json.loads(line) for line in Path(told["table"]).read_text().splitlines()]
    assert [set(row) for row in rows] == [{"image", "question", "answer", "kind"}] * 3
    with Image.open(tmp_path / rows[0]["image"]) as picture:
        assert picture.size == (96, 96)


def test_without_scikit_learn_the_extra_is_named(refused, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("dropflow_lab.console.commands.digits.find_spec", lambda _: None)
    assert "dropflow[digits]" in refused("digits", "sample", "--out", tmp_path)


@pytest.mark.parametrize("command", ["train", "sample"])
def test_the_folder_must_be_given_and_writable(refused, tmp_path, command) -> None:
    assert "--out" in refused("digits", command)
    (tmp_path / "taken").touch()
    line = refused("digits", command, "--out", tmp_path / "taken")
    assert line.endswith("taken is not a writable folder; name another one")


def test_conversations_are_trained_as_a_change(cli, refused, monkeypatch, tmp_path) -> None:
    calls: list[dict[str, Any]] = []

    def train(out: Path, change: Change, test: Any, **options: Any) -> Path:
        assert change.phase.name == "conversations"
        assert callable(test)
        calls.append(options)
        return out

    monkeypatch.setattr("dropflow_lab.digits.training.train_change.train_change", train)
    cli("digits", "train", "--out", tmp_path, "--conversations", "--seed", 3)
    assert calls == [{"seed": 3, "threads": 1, "resume": True}]
    for two in (("--clips", "--plain"), ("--conversations", "--clips"), ("--plain", "--conversations")):
        assert "name one of them" in refused("digits", "train", "--out", tmp_path, *two)


def test_clips_are_trained_as_a_change_and_written(cli, monkeypatch, tmp_path) -> None:
    calls: list[dict[str, Any]] = []

    def train(out: Path, change: Change, test: Any, **options: Any) -> Path:
        assert change.phase.name == "clips"
        assert callable(test)
        calls.append(options)
        return out

    monkeypatch.setattr("dropflow_lab.digits.training.train_change.train_change", train)
    cli("digits", "train", "--out", tmp_path, "--clips", "--threads", 2)
    assert calls == [{"seed": 0, "threads": 2, "resume": True}]
    told = json.loads(cli("digits", "sample", "--out", tmp_path, "--clips", "--questions", 2, "--json").stdout)
    rows = [json.loads(line) for line in Path(told["table"]).read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["c2d", "d2c"]
    with Image.open(tmp_path / rows[1]["video"] / "8.png") as frame:
        assert frame.size == (48, 48)
