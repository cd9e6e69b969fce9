"""`dropflow run`."""

from __future__ import annotations

import json

import pytest
from PIL import Image

import dropflow
from dropflow_lab.inputs.models import load_model


def test_both_answers_and_what_was_saved(cli, model_folder, mild) -> None:
    result = cli("run", "--model", model_folder, "--policy", mild, "--max-new-tokens", 2, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["policy"] == "mild"
    assert all(len(told[answer].split()) <= 2 for answer in ("answer", "answer_dense"))
    text = 10  # <s> user : what digit is yellow ? assistant :
    assert told["question"] == "what digit is yellow ?"
    assert [layer["visual_tokens"] for layer in told["layers"]] == [144, 144, 40, 0]
    assert [layer["kv_entries"] - layer["visual_tokens"] for layer in told["layers"]] == [text] * 4
    assert (told["visual_tokens"], told["entry_visual_tokens"], told["average_visual_tokens"]) == (144, 144, 82)
    assert told["flops"] == sum(layer["flops"] for layer in told["layers"]) < told["flops_dense"]
    assert told["kv_bytes"] / told["kv_bytes_dense"] == (328 + 40) / (4 * 154)
    assert "text included" in told["unit"]


def test_tables_for_people(cli, model_folder, mild) -> None:
    result = cli("run", "--model", model_folder, "--policy", mild, "--max-new-tokens", 2)
    assert result.exit_code == 0, result.stderr
    shown = " ".join(result.stdout.split())
    assert "what digit is yellow ?" in shown
    assert "│ 2 │ 40 │ 50 │" in shown
    assert "│ visual tokens, average over layers │ 144 │ 82.00 │" in shown


def test_without_arguments_the_dense_and_the_trained_model_are_asked_about_their_picture(cli) -> None:
    told = json.loads(cli("run", "--json").stdout)
    assert (told["policy"], told["visual_tokens"], len(told["layers"])) == ("hidrop-digits", 144, 12)
    assert told["average_visual_tokens"] == 36
    assert told["answer_dense"] == told["answer"] == "8"
    shown = " ".join(cli("run").stdout.split())
    assert "dense model" in shown
    assert "trained with policy" in shown


def test_a_model_that_records_a_policy_needs_no_other(cli, mild, model_folder, tmp_path) -> None:
    model, processor = load_model(model_folder)
    with dropflow.attach(model, str(mild)):
        model.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
    arguments = ("run", "--model", tmp_path / "model", "--max-new-tokens", 1, "--set", "stages.exit=null", "--json")
    told = json.loads(cli(*arguments).stdout)
    assert [layer["visual_tokens"] for layer in told["layers"]] == [144, 144, 40, 40]


def test_pictures_and_question_of_ones_own(cli, model_folder, mild, tmp_path) -> None:
    picture = tmp_path / "grey.png"
    Image.new("L", (50, 70), 128).save(picture)
    arguments = ("run", picture, picture, "--question", "is there a 7 ?", "--set", "stages.exit.at=2")
    arguments += ("--set", "stages.pyramid=null", "--model", model_folder, "--policy", mild, "--max-new-tokens", 1)
    told = json.loads(cli(*arguments, "--json").stdout)
    assert told["question"] == "is there a 7 ?"
    assert [layer["visual_tokens"] for layer in told["layers"]] == [288, 288, 0, 0]


@pytest.mark.parametrize("policy", ["hidrop-64", "no-such-policy"])
def test_a_missing_picture_or_policy(refused, tmp_path, policy) -> None:
    missing = tmp_path / "missing.png"
    expected = policy if policy == "no-such-policy" else "missing.png: no such image file"
    assert expected in refused("run", missing, "--policy", policy)


def test_a_file_that_is_no_picture(refused, mild) -> None:
    assert "not an image" in refused("run", mild, "--policy", "hidrop-64")


def test_a_missing_model_folder(refused, tmp_path) -> None:
    assert "no-model" in refused("run", "--model", tmp_path / "no-model", "--policy", "hidrop-64")


def test_a_folder_that_holds_no_multimodal_model(refused, tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-family"}')
    assert "cannot load this model" in refused("run", "--model", tmp_path, "--policy", "hidrop-64")


def test_a_model_of_ones_own_needs_a_policy(refused, model_folder) -> None:
    assert "--policy" in refused("run", "--model", model_folder)


def test_a_policy_for_another_shape(refused, model_folder) -> None:
    assert "rescale: true" in refused("run", "--model", model_folder, "--policy", "hidrop-64")
