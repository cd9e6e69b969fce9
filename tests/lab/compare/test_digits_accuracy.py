"""Scores, intervals and the folder of examples."""

import json

import pytest
from PIL import Image

from dropflow_lab.compare.digits_accuracy import Accuracy, Score, answer
from dropflow_lab.compare.digits_accuracy import evaluate as evaluate_function
from dropflow_lab.digits.checkpoints.model import build_model, build_processor
from dropflow_lab.digits.data.dataset import examples, write_folder
from dropflow_lab.digits.data.questions import KINDS


def test_a_score_has_the_interval_of_a_share():
    assert Score(960, 1000).interval() == pytest.approx((0.94600, 0.97048), abs=1e-4)
    assert Score(0, 0).interval() == (0.0, 1.0)
    assert Score(0, 0).share == 0.0


def test_evaluate_counts_right_answers_per_kind():
    model, processor = build_model(0, decoder_layers=1).eval(), build_processor()
    accuracy = evaluate_function(model, processor, "validation", 25, seed=1, batch_size=10, progress=False)
    expected = [example.answer for example in examples("validation", 25, 1)]
    hits = [given == wanted for given, wanted in zip(accuracy.answers, expected, strict=True)]
    assert accuracy.overall == Score(sum(hits), 25)
    assert {kind: score.asked for kind, score in accuracy.kinds.items()} == {
        kind: 3 if place < 5 else 2 for place, kind in enumerate(KINDS)
    }


def test_answers_do_not_depend_on_the_batch():
    model, processor = build_model(1, decoder_layers=2).eval(), build_processor()
    asked = list(examples("test", 6, 2))
    together = answer(model, processor, asked)
    assert together == [answer(model, processor, [example])[0] for example in asked]


def test_evaluate_runs_through_hooks_on_the_model():
    model, processor = build_model(0, decoder_layers=2).eval(), build_processor()
    lengths = []
    layer = model.model.language_model.layers[0]
    handle = layer.register_forward_hook(lambda _module, inputs, _output: lengths.append(inputs[0].shape[1]))
    evaluate_function(model, processor, "test", 2, batch_size=2, progress=False)
    handle.remove()
    assert lengths[0] > 144
    assert set(lengths[1:]) <= {1}


def test_report_as_json():
    report = json.loads(Accuracy(Score(3, 4), {"pos": Score(3, 4)}, ()).to_json())
    assert report["pos"] == {"right": 3, "asked": 4, "share": 0.75, "interval": [0.3006, 0.9544]}
    assert report["overall"] == report["pos"]


def test_folder_holds_the_same_examples(tmp_path):
    table = write_folder(tmp_path, "test", 12, seed=3)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    wanted = list(examples("test", 12, 3))
    assert [(r["question"], r["answer"], r["kind"]) for r in rows] == [(e.question, e.answer, e.kind) for e in wanted]
    for row, example in zip(rows, wanted, strict=True):
        assert Image.open(tmp_path / row["image"]).tobytes() == example.image.tobytes()
