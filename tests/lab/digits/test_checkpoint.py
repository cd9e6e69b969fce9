"""The shipped checkpoint: loads offline through the stock classes, is small, and answers well."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from dropflow_lab.compare.digits_accuracy import TEST_SEED, evaluate
from dropflow_lab.digits.checkpoints.changes import CHANGES
from dropflow_lab.digits.checkpoints.model import (
    build_model,
    build_processor,
    checkpoint_path,
    load,
    sample_image,
)
from dropflow_lab.digits.data.questions import VOCABULARY

FLOOR = 0.9
"""Share of right answers on 60 questions; about three standard errors below the measured share."""


@pytest.fixture(scope="module")
def shipped():
    return load("dense")


def test_loads_through_the_auto_classes_without_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = checkpoint_path("dense")
    model = AutoModelForImageTextToText.from_pretrained(path)
    processor = AutoProcessor.from_pretrained(path)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert model.dtype == torch.bfloat16
    assert processor.num_additional_image_tokens == 1


def test_shapes_are_those_of_the_recipe(shipped):
    model, processor = shipped
    assert model.dtype == torch.float32
    assert not model.training
    config = model.config
    assert (config.text_config.num_hidden_layers, config.text_config.hidden_size) == (12, 128)
    assert (config.vision_config.num_hidden_layers, config.vision_config.hidden_size) == (4, 96)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert sum(weight.numel() for weight in model.parameters()) == 2_832_448
    inputs = processor(images=sample_image(), text="<s> user : <image> assistant :", return_tensors="pt")
    assert int((inputs["input_ids"] == config.image_token_id).sum()) == 144


def test_all_weights_come_from_the_file(shipped):
    fresh = build_model(5).state_dict()
    same = [name for name, value in shipped[0].state_dict().items() if torch.equal(value, fresh[name])]
    assert same == []


def test_saved_tokenizer_is_the_one_that_is_built(shipped):
    saved, built = shipped[1], build_processor()
    assert saved.tokenizer.get_vocab() == built.tokenizer.get_vocab()
    assert saved.tokenizer.convert_ids_to_tokens(range(len(VOCABULARY))) == list(VOCABULARY)
    assert saved.chat_template == built.chat_template
    assert saved.tokenizer.padding_side == "left"


def test_files_are_small_bf16_and_readable():
    path = checkpoint_path("dense")
    files = {file.name: file.stat() for file in path.iterdir()}
    assert sum(stat.st_size for stat in files.values()) <= 8 * 1024 * 1024
    assert all(stat.st_mode & 0o444 == 0o444 for stat in files.values())
    assert {"config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja"} <= files.keys()
    with safe_open(path / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_answers_held_out_questions(shipped):
    accuracy = evaluate(*shipped, "test", 60, seed=7, batch_size=30, progress=False)
    assert accuracy.overall.share >= FLOOR


def test_card_states_the_measured_accuracy():
    path = checkpoint_path("dense")
    report = json.loads((path / "test.json").read_text())
    card = (path / "README.md").read_text()
    assert report["overall"]["asked"] >= 1000
    assert report["overall"]["share"] >= 0.95
    assert f"seed {TEST_SEED}" in card
    for name, score in report.items():
        assert re.search(rf"\| {name} +\| {100 * score['share']:.1f} % \|", card), name


def test_log_is_complete_and_chose_on_validation():
    lines = (checkpoint_path("dense") / "training-log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["phase"] for row in rows] == sorted((row["phase"] for row in rows), reverse=True)
    assert {"step", "loss", "learning_rate", "seconds"} <= rows[-1].keys()
    assert rows[-1]["accuracy"] >= 0.95


def test_unknown_checkpoint_names_the_known_ones():
    with pytest.raises(LookupError, match=r"dense.*got 'desne'"):
        checkpoint_path("desne")


@pytest.mark.parametrize("name", CHANGES)
def test_checkpoints_stored_as_changes_say_how_they_are_loaded(name):
    with pytest.raises(LookupError, match=rf"stored as a change.*load_model\(Path\('{name}'\)\)$"):
        load(name)


def test_sample_is_a_scene():
    image = sample_image()
    assert (image.mode, image.size) == ("RGB", (96, 96))
