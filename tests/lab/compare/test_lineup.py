"""Which rows a comparison has: models of their own, seeds, position schemes, and what is the same or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dropflow
from dropflow import BackboneShape
from dropflow_lab.compare.lineup import DENSE, Subject, line_up, load_models, subjects_of
from dropflow_lab.compare.same_plan import meaning
from dropflow_lab.digits.checkpoints.model import build_model, build_processor

DIGITS = BackboneShape(12, 144)
GONE = "name: gone\npositions: compact\nstages:\n  exit: {use: hidrop/early-exit, at: 1}\n"


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, Any]]:
    """A shared model, and another that records the policy `gone`; two layers, 144 visual tokens."""
    shared, other = (build_model(seed, decoder_layers=2).eval() for seed in (0, 7))
    with dropflow.attach(other, {"name": "gone", "stages": {"exit": {"use": "hidrop/early-exit", "at": 1}}}) as flow:
        flow.record()
    return {"": (shared, build_processor()), "other": (other, build_processor())}


@pytest.fixture
def gone(tmp_path: Path) -> str:
    path = tmp_path / "gone.yaml"
    path.write_text(GONE)
    return str(path)


def test_policy_and_model_are_told_apart_by_an_at_sign() -> None:
    assert Subject.parse(" a/b.yaml@runs/{seed}") == Subject("a/b.yaml", "runs/{seed}")
    assert Subject.parse("@hidrop") == Subject("", "hidrop")
    assert Subject("p", "runs/{seed}").members(2) == [Subject("p", "runs/0"), Subject("p", "runs/1")]
    assert Subject("p-{seed}", "m").members(2) == [Subject("p-0", "m"), Subject("p-1", "m")]
    assert Subject("dense").members(3) == [Subject("dense", "")]


def test_each_model_has_a_row_without_a_policy_first() -> None:
    assert subjects_of(["a", "b@m", "dense"]) == [Subject(DENSE), Subject("a"), Subject("b", "m")]
    assert subjects_of(["a", "b@m"], ["x", "y"]) == [
        Subject(DENSE, "x"),
        Subject("a", "x"),
        Subject(DENSE, "y"),
        Subject("a", "y"),
        Subject("b", "m"),
    ]


def test_every_model_is_loaded_once() -> None:
    loaded: list[str] = []

    def load(name: str) -> tuple[str, str]:
        loaded.append(name)
        return name, ""

    assert load_models(subjects_of(["p", "p@run-{seed}", "q@run-1"]), 2, load)["run-1"] == ("run-1", "")
    assert loaded == ["", "run-0", "run-1"]


def test_rows_are_of_their_own_model_and_policy(models: dict[str, tuple[Any, Any]], gone: str) -> None:
    found = line_up(subjects_of([gone, "dense@other", "@other"]), models)
    assert [str(entry.title) for entry in found.entries] == ["dense", "gone", "dense@other", "gone@other"]
    assert [[model for model, _ in entry.members] for entry in found.entries] == [[""], [""], ["other"], ["other"]]
    assert [entry.members[0][1] is None for entry in found.entries] == [True, False, True, False]


def test_a_row_of_seeds_has_a_policy_for_each(models: dict[str, tuple[Any, Any]], tmp_path: Path) -> None:
    for seed in range(2):
        text = f"stages:\n  keep: {{use: control/random, encode: 36, seed: {seed}}}\n"
        (tmp_path / f"random-{seed}.yaml").write_text(text)
    found = line_up([Subject(f"{tmp_path}/random-{{seed}}.yaml")], models, seeds=2)
    (entry,) = found.entries
    assert str(entry.title) == f"{tmp_path}/random-{{seed}}.yaml"
    assert [policy and policy.name for _, policy in entry.members] == ["random-0", "random-1"]


def test_compact_positions_get_a_row_of_their_own(models: dict[str, tuple[Any, Any]], gone: str) -> None:
    subjects = [Subject(gone), Subject("", "other")]  # the recorded one has persistent positions as it is
    both = line_up(subjects, models, persistent=True).entries
    assert [str(entry.title) for entry in both] == ["gone", "gone (persistent)", "gone@other"]
    assert [entry.members[0][1].positions for entry in both if entry.members[0][1]] == [
        "compact",
        "persistent",
        "persistent",
    ]
    alone = line_up(subjects, models, published=False, persistent=True).entries
    assert [str(entry.title) for entry in alone] == ["gone (persistent)", "gone@other"]


def test_what_does_not_fit_says_why(models: dict[str, tuple[Any, Any]], gone: str) -> None:
    found = line_up([Subject("hidrop-64"), Subject("nope"), Subject(""), Subject(gone, "other")], models)
    assert [str(entry.title) for entry in found.entries] == ["gone@other"]
    assert "rescale" in found.refused["hidrop-64"]
    assert "nope" in found.refused["nope"]
    assert "none is recorded" in found.refused[""]


def test_a_policy_for_another_shape_is_marked(models: dict[str, tuple[Any, Any]]) -> None:
    found = line_up([Subject("divprune-56"), Subject("pyramiddrop", "")], models, ["rescale=true"])
    titles = {entry.title.policy: entry.title for entry in found.entries}
    assert titles["divprune-56"].rescaled
    assert str(titles["divprune-56"]) == "divprune-56 (rescaled)"


def test_policies_that_come_to_the_same_are_told() -> None:
    def meant(name: str, shape: BackboneShape = DIGITS) -> Any:
        return meaning(dropflow.load_policy(name, ["rescale=true"]), shape)

    assert meant("fastv-k2-r50") == meant("fastv-k3-r50")  # 2 and 3 of 32 layers are both the first of 12
    assert meant("fastv-k2-r50") != meant("fastv-k2-r75")
    assert meant("fastv-k2-r50", BackboneShape(32, 576)) != meant("fastv-k3-r50", BackboneShape(32, 576))
    assert meant("vtw-15") == meant("vtw-16")
    assert meant("mustdrop-128") != meant("mustdrop-192")  # other thresholds, whatever they come to


def test_the_first_of_those_that_are_the_same_stands_for_all(
    models: dict[str, tuple[Any, Any]], tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        text = f"stages:\n  keep: {{use: control/random, encode: 36, seed: {seed}}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    found = line_up(subjects_of([f"{tmp_path}/{name}.yaml" for name in "abc"]), models)
    assert [str(entry.title) for entry in found.entries] == ["dense", "a, b", "c"]
