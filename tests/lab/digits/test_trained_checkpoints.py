"""The checkpoints that were trained through a policy: they record it, and answer well under it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import dropflow
from dropflow_lab.compare.digits_accuracy import evaluate
from dropflow_lab.digits.checkpoints.model import checkpoint_path, load

POLICIES = {"hidrop": "hidrop-digits", "hidrop-90": "hidrop-digits-90"}
FLOOR = 0.8
"""Share of right answers on 40 questions of all ten kinds; measured: see `test.json` of each."""


@pytest.fixture(scope="module", params=POLICIES)
def shipped(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    return request.param, *load(request.param)


def test_the_recorded_policy_is_the_shipped_one(shipped: tuple[str, Any, Any]) -> None:
    name, model, _ = shipped
    with dropflow.attach(model) as flow:
        assert flow.policy == dropflow.load_policy(POLICIES[name])


def test_it_answers_held_out_questions_under_its_policy(shipped: tuple[str, Any, Any]) -> None:
    _, model, processor = shipped
    with dropflow.attach(model):
        accuracy = evaluate(model, processor, "test", 40, seed=7, batch_size=40, progress=False)
    assert accuracy.overall.share >= FLOOR


def test_the_dense_checkpoint_does_not(shipped: tuple[str, Any, Any]) -> None:
    name, _, processor = shipped
    dense, _ = load("dense")
    with dropflow.attach(dense, POLICIES[name]):
        accuracy = evaluate(dense, processor, "test", 40, seed=7, batch_size=40, progress=False)
    assert accuracy.overall.share <= FLOOR - 0.2


@pytest.mark.parametrize("name", [*POLICIES, "dense-plain"])
def test_files_are_small_bf16_and_readable(name: str) -> None:
    path = checkpoint_path(name)
    files = {file.name: file.stat() for file in path.iterdir()}
    assert sum(stat.st_size for stat in files.values()) <= 8 * 1024 * 1024
    assert all(stat.st_mode & 0o444 == 0o444 for stat in files.values())
    with safe_open(path / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(key).dtype for key in weights.keys()} == {torch.bfloat16}  # noqa: SIM118


@pytest.mark.parametrize("name", [*POLICIES, "dense-plain"])
def test_the_vision_tower_is_that_of_the_dense_checkpoint(name: str) -> None:
    dense, trained = (load_file(checkpoint_path(one) / "model.safetensors") for one in ("dense", name))
    tower = {key for key in dense if "vision_tower" in key}
    assert tower
    assert {key for key in dense if torch.equal(dense[key], trained[key])} >= tower


@pytest.mark.parametrize("name", POLICIES)
def test_the_card_states_command_and_measured_accuracy(name: str) -> None:
    path = checkpoint_path(name)
    report = json.loads((path / "test.json").read_text())
    card = (path / "README.md").read_text()
    assert "dropflow train" in card
    assert report["policy"].split("@")[0] == POLICIES[name]
    assert sum(kind["asked"] for kind in report["kinds"].values()) >= 1000
    for kind, score in {"eight kinds": report, **report["kinds"]}.items():
        assert re.search(rf"\| {kind} +\| {100 * score['accuracy']:.1f} % \|", card), kind


def test_the_plain_checkpoint_answers_as_its_card_says() -> None:
    path = checkpoint_path("dense-plain")
    card = (path / "README.md").read_text()
    report = json.loads((path / "test.json").read_text())
    assert "dropflow digits train --plain" in card
    assert report["overall"]["asked"] == 2000
    for kind, score in report.items():
        assert f"| {kind} | {100 * score['share']:.1f} % |" in card, kind
    accuracy = evaluate(*load("dense-plain"), "test", 40, seed=7, batch_size=40, progress=False)
    assert accuracy.overall.share >= 0.7
