"""The accuracy benchmark: the same questions for every policy, tokens as measured, finished rows read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dropflow
from dropflow.errors import PolicyError
from dropflow_lab.bench import accuracy as bench
from dropflow_lab.bench.accuracy import AccuracyRow, bench_accuracy
from dropflow_lab.compare.answers import Answers
from dropflow_lab.compare.digits_accuracy import Score, evaluate
from dropflow_lab.digits.checkpoints.model import build_model, build_processor
from dropflow_lab.digits.data.dataset import examples
from dropflow_lab.digits.data.questions import KINDS

PRUNED = dropflow.load_policy(
    {
        "name": "pruned",
        "stages": {
            "encode": {"use": "control/random", "encode": 100},
            "keep": {"use": "control/random", "keep": {1: 40}},
        },
    }
)
QUESTIONS = 20


@pytest.fixture(scope="module")
def subject() -> tuple[Any, Any]:
    """A model with weights so large that its answers differ from picture to picture."""
    model = build_model(0, decoder_layers=2).eval()
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 1.2 * weight.shape[-1] ** -0.5, generator=dice)
    model.generation_config.suppress_tokens = [model.config.image_token_id]
    return model, build_processor()


def rows_of(subject: tuple[Any, Any], out: Path, *policies: Any, **options: Any) -> list[AccuracyRow]:
    return list(bench_accuracy(*subject, policies, out, **({"questions": QUESTIONS, "seed": 1} | options)))


@pytest.fixture(scope="module")
def measured(subject: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[AccuracyRow], Path]:
    out = tmp_path_factory.mktemp("rows")
    return rows_of(subject, out, PRUNED), out


def test_tokens_are_those_that_were_live(measured: tuple[list[AccuracyRow], Path]) -> None:
    dense, pruned = measured[0]
    assert (dense.policy, dense.average_visual_tokens, dense.entry_visual_tokens) == ("dense", 144, 144)
    assert (pruned.policy, pruned.average_visual_tokens, pruned.entry_visual_tokens) == ("pruned", 70, 100)


def test_answers_are_those_of_the_stock_path(
    subject: tuple[Any, Any], measured: tuple[list[AccuracyRow], Path]
) -> None:
    model, processor = subject
    plain = evaluate(model, processor, "test", QUESTIONS, seed=1, progress=False)
    with dropflow.attach(model, PRUNED):
        under = evaluate(model, processor, "test", QUESTIONS, seed=1, progress=False)
    assert [row.answers for row in measured[0]] == [plain.answers, under.answers]
    assert plain.answers != under.answers


def test_count_and_read_are_shown_apart(subject: tuple[Any, Any], tmp_path: Path, monkeypatch: Any) -> None:
    asked = list(examples("test", 40, 1))
    wrong = {"count": {3}, "read": {8, 18}, "pos": {0, 10, 20}}
    wrong_places = {place for places in wrong.values() for place in places}
    said = tuple("?" if place in wrong_places else one.answer for place, one in enumerate(asked))
    monkeypatch.setattr(bench, "ask", lambda *_, **__: Answers(said, 144, 144))
    (row,) = rows_of(subject, tmp_path, questions=40)
    assert [KINDS[place % 10] for places in wrong.values() for place in sorted(places)] == [
        kind for kind, places in wrong.items() for _ in places
    ]
    assert row.accuracy == 29 / 32
    assert (row.low, row.high) == Score(29, 32).interval()
    assert (row.count.accuracy, row.read.accuracy) == (3 / 4, 2 / 4)
    assert (row.read.low, row.read.high, row.read.asked) == (*Score(2, 4).interval(), 4)
    assert {kind: share.accuracy for kind, share in row.kinds.items() if share.accuracy < 1} == {
        "count": 3 / 4,
        "read": 2 / 4,
        "pos": 1 / 4,
    }


def test_finished_rows_are_read_and_not_measured_again(
    subject: tuple[Any, Any], measured: tuple[list[AccuracyRow], Path], monkeypatch: Any
) -> None:
    rows, out = measured
    assert len(list(out.iterdir())) == 2
    asked: list[int] = []
    real = bench.ask

    def counted(model: Any, processor: Any, policy: Any, samples: Any, **how: Any) -> Answers:
        asked.append(len(samples))
        return real(model, processor, policy, samples, **how)

    monkeypatch.setattr(bench, "ask", counted)
    assert rows_of(subject, out, PRUNED) == rows
    assert asked == []
    other = dropflow.load_policy(PRUNED, ["stages.keep.keep.1=20"])
    again = rows_of(subject, out, other)
    assert (sum(asked), again[0], again[1].average_visual_tokens) == (QUESTIONS, rows[0], 60)


def test_other_questions_and_other_weights_are_other_rows(subject: tuple[Any, Any], tmp_path: Path) -> None:
    few = {"questions": 2}
    rows_of(subject, tmp_path, **few)
    rows_of(subject, tmp_path, **few, seed=2)
    rows_of((build_model(1, decoder_layers=2).eval(), subject[1]), tmp_path, **few)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    facts = [json.loads(file.read_text())["facts"] for file in files]
    assert len({fact["weights"] for fact in facts}) == 2
    assert sorted(fact["seed"] for fact in facts) == [1, 1, 2]


def test_an_interrupted_run_keeps_what_was_finished(subject: tuple[Any, Any], tmp_path: Path) -> None:
    rows = bench_accuracy(*subject, [PRUNED], tmp_path, questions=2, seed=0)
    assert next(rows).policy == "dense"
    rows.close()
    assert [file.name.split("-")[0] for file in tmp_path.iterdir()] == ["dense"]


def test_a_policy_that_does_not_fit_is_refused_before_anything_runs(subject: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="rescale"):
        rows_of(subject, tmp_path, PRUNED, "hidrop-64")
    assert not list(tmp_path.iterdir())


def test_a_policy_without_stages_counts_all_tokens(subject: tuple[Any, Any], tmp_path: Path) -> None:
    dense, empty = rows_of(subject, tmp_path, {"name": "empty", "stages": {}}, questions=3)
    assert (empty.average_visual_tokens, empty.entry_visual_tokens) == (144, 144)
    assert empty.answers == dense.answers


def test_the_default_folder_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert bench.default_folder() == tmp_path / "dropflow" / "bench-accuracy"
