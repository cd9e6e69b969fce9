"""Rows of the accuracy benchmark: policy and model by name, and means over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dropflow
from dropflow.errors import PolicyError
from dropflow_lab.bench.accuracy import Bench
from dropflow_lab.bench.accuracy_rows import Subject, bench_subjects
from dropflow_lab.compare.answers import Answers
from dropflow_lab.compare.digits_accuracy import Score
from dropflow_lab.digits.checkpoints.model import build_model, build_processor
from dropflow_lab.digits.data.questions import KINDS

EXIT = "name: gone\nstages:\n  exit: {use: hidrop/early-exit, at: 1}\n"
QUESTIONS = 20


@pytest.fixture(scope="module")
def subject() -> tuple[Any, Any]:
    return build_model(0, decoder_layers=2).eval(), build_processor()


def rows_of(out: Path, loaded: dict[str, tuple[Any, Any]], *texts: str, seeds: int = 3) -> list[Any]:
    bench = Bench(out, QUESTIONS, seed=1)
    return list(bench_subjects([Subject.parse(text) for text in texts], loaded.__getitem__, bench, seeds))


def test_policy_and_model_are_told_apart_by_an_at_sign() -> None:
    assert Subject.parse(" a/b.yaml@runs/{seed}") == Subject(" a/b.yaml@runs/{seed}", "a/b.yaml", "runs/{seed}")
    assert [one.model for one in Subject.parse("p@runs/{seed}").members(2)] == ["runs/0", "runs/1"]
    assert Subject.parse("dense").members(3) == [Subject("dense", "dense", "")]


def test_each_row_is_of_its_own_model(tmp_path: Path, subject: tuple[Any, Any]) -> None:
    path = tmp_path / "gone.yaml"
    path.write_text(EXIT)
    recording = build_model(7, decoder_layers=2).eval()
    with dropflow.attach(recording, str(path)) as flow:
        flow.record()
    loaded = {"": subject, "other": (recording, subject[1])}
    rows = rows_of(tmp_path / "rows", loaded, "dense", str(path), "dense@other", "@other")
    assert [row.policy for row in rows] == ["dense", "gone", "dense@other", "gone@other"]
    assert [row.average_visual_tokens for row in rows] == [144, 72, 144, 72]
    assert len(list((tmp_path / "rows").iterdir())) == 4
    assert rows[0].answers != rows[2].answers


def test_a_row_with_seeds_is_their_mean(tmp_path: Path, subject: tuple[Any, Any], monkeypatch: Any) -> None:
    right = iter([{"pos"}, set(KINDS), {"pos", "read", "sum", "d2c"}])
    known: dict[int, set[str]] = {}

    def ask(model: Any, _processor: Any, _policy: Any, asked: Any, **_: Any) -> Answers:
        kinds = known.setdefault(id(model), next(right) if id(model) not in known else set())
        return Answers(tuple(one.answer if one.kind in kinds else "?" for one in asked), 144, 144)

    monkeypatch.setattr("dropflow_lab.bench.accuracy.ask", ask)
    loaded = {f"run-{seed}": (build_model(seed, decoder_layers=1).eval(), subject[1]) for seed in range(3)}
    (row,) = rows_of(tmp_path, loaded, "dense@run-{seed}")
    assert row.policy == "dense@run-{seed}"
    assert row.by_seed == (1 / 8, 1, 3 / 8)
    assert row.accuracy == pytest.approx(1 / 2)
    assert (row.low, row.high) == pytest.approx(Score(8, 16).interval())
    assert (row.count.accuracy, row.read.accuracy) == pytest.approx((1 / 3, 2 / 3))
    assert row.to_json()["by_seed"] == row.by_seed


def test_a_policy_that_does_not_fit_is_refused_before_anything_runs(tmp_path: Path, subject: tuple[Any, Any]) -> None:
    with pytest.raises(PolicyError, match="rescale"):
        rows_of(tmp_path, {"": subject}, "dense", "hidrop-64")
    with pytest.raises(PolicyError, match="none is recorded"):
        rows_of(tmp_path, {"": subject, "plain": subject}, "@plain")
    assert not list(tmp_path.iterdir())
