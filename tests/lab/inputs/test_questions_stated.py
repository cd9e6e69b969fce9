"""Instruments state the questions they ask, so that stages can read them as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_clip import save_clip

import dropflow
from dropflow_lab.compare.answers import ask
from dropflow_lab.compare.cost import measure_cost
from dropflow_lab.compare.digits_accuracy import evaluate
from dropflow_lab.explain.side_by_side import compare
from dropflow_lab.inputs.data import read_samples
from dropflow_lab.inputs.models import load_model
from dropflow_lab.trace import record


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> dropflow.Policy:
    """A policy whose stage reads the question with a CLIP as wide as the digits model's tower; 20 of 144 tokens."""
    clip = save_clip(tmp_path_factory.mktemp("clip"), width=96)
    stage = {"use": "cdpruner/conditional-dpp", "keep": 20, "clip": clip}
    return dropflow.load_policy({"name": "reading", "stages": {"dpp": stage}})


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[Any, Any]:
    return load_model(model_folder)


def test_in_a_comparison(loaded: tuple[Any, Any], reading: dropflow.Policy) -> None:
    model, processor = loaded
    samples = read_samples("digits", 3)
    answers = ask(model, processor, reading, samples, batch=2, max_new_tokens=2)
    assert (len(answers.said), answers.average_visual_tokens) == (3, 20)
    cost = measure_cost(model, processor, reading, samples[:1], rounds=2)
    assert cost.work.flops_counted == pytest.approx(cost.work.flops_formula, rel=0.01)
    assert cost.times is not None


def test_in_an_answer_a_trace_and_an_evaluation(loaded: tuple[Any, Any], reading: dropflow.Policy) -> None:
    model, processor = loaded
    sample = read_samples("digits", 1)[0]
    said = compare(model, processor, sample.images(), sample.question, reading, 2)
    assert said.report.average_visual_tokens == 20
    (run,) = record(model, processor, sample.images(), sample.question, [reading], 2).runs
    assert [layer.visual_tokens for layer in run.layers] == [20] * 4
    assert run.encode == []  # what a patch carries decides nothing
    with dropflow.attach(model, reading) as flow:
        evaluate(model, processor, count=2, batch_size=2, progress=False)
        assert flow.report().average_visual_tokens == 20
