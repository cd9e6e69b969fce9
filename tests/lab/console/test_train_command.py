"""`dropflow train`: a folder that loads, records its policy, and comes out the same when the run was interrupted."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import dropflow
from dropflow.errors import PolicyError
from dropflow_lab.digits.data.dataset import write_folder
from dropflow_lab.errors import InputError
from dropflow_lab.finetune import FolderDialogues, load_weights
from dropflow_lab.inputs.data import read_samples
from dropflow_lab.inputs.models import load_model

pytest.importorskip("accelerate")

SMALL = ("--steps", 4, "--batch", 2, "--rounds", 2, "--save-every", 2, "--precision", "fp32", "--json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_folder) -> Path:
    """A run of four steps that was never interrupted."""
    from typer.testing import CliRunner

    from dropflow_lab.console.cli import app

    folder = tmp_path_factory.mktemp("trained")
    policy = folder / "mild.yaml"
    policy.write_text(
        "name: mild\ntuned_for: {layers: 4, visual_tokens: 144}\n"
        "stages:\n"
        "  inject: {use: hidrop/late-injection, at: 1}\n"
        "  pyramid: {use: hidrop/concave-pyramid, keep: {2: 40}}\n"
        "  exit: {use: hidrop/early-exit, at: 3}\n"
    )
    arguments = ("train", "--policy", policy, "--model", model_folder, "--out", folder / "model", *SMALL)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert json.loads(result.stdout) == {"out": str(folder / "model"), "policy": "mild", "steps": 4}
    return folder


def test_the_folder_loads_and_knows_its_policy(trained) -> None:
    model, _ = load_model(trained / "model")
    with dropflow.attach(model) as flow:
        assert flow.policy == dropflow.load_policy(trained / "mild.yaml")
    assert "use_cache" not in json.loads((trained / "model" / "config.json").read_text())


def test_what_is_trained_has_moved_and_the_vision_tower_has_not(trained, model_folder) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, trained / "model"))
    frozen = {name for name in before if "vision_tower" in name}
    assert frozen
    assert {name for name in before if torch.equal(before[name].float(), after[name])} == frozen


def test_an_interrupted_run_ends_with_the_same_weights(trained, model_folder, cli, tmp_path) -> None:
    """From the last checkpoint that is whole; a later one has lost its optimizer, the last was not finished."""
    run, own = tmp_path / "model" / "run" / "digits", trained / "model" / "run" / "digits"
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(own / name, run / name)
    shutil.copy(own.parent / "settings.json", run.parent)
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    shutil.copytree(run / "checkpoint-4", run / "checkpoint-5")
    (run / "checkpoint-5" / "trainer_state.json").unlink()
    arguments = ("--policy", trained / "mild.yaml", "--model", model_folder, "--out", tmp_path / "model", "--resume")
    result = cli("train", *arguments, *SMALL)
    assert result.exit_code == 0, result.stderr
    told = [line for line in result.stderr.splitlines() if "checkpoint-" in line]
    assert told == [
        f"{run / 'checkpoint-5'}: skipped; it has no whole trainer_state.json, so it was never finished",
        f"{run / 'checkpoint-4'}: skipped; it has no optimizer.pt",
        f"continuing from {run / 'checkpoint-2'}",
    ]
    whole, resumed = ((folder / "model" / "model.safetensors").read_bytes() for folder in (trained, tmp_path))
    assert sha256(whole).hexdigest() == sha256(resumed).hexdigest()
    assert not [path for path in (tmp_path / "model").iterdir() if path.name.startswith(".")]


def test_a_run_is_resumed_as_it_was_begun(trained, model_folder, refused) -> None:
    arguments = ("--policy", trained / "mild.yaml", "--model", model_folder, "--out", trained / "model", "--resume")
    line = refused("train", *arguments, *SMALL, "--batch", 3, "--set", "stages.exit.at=4", "--save-every", 1)
    assert (
        "settings.json: --resume keeps a run's settings, but these differ: policy.stages.exit.at (then: 3, now: 4)"
        in line
    )
    assert "), stages.digits.batch (then: 2, now: 3), stages.digits.samples (then: 8, now: 12); use" in line
    assert "save_every" not in line


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(trained, model_folder, cli, tmp_path) -> None:
    run = tmp_path / "model" / "run" / "digits"
    (run / "checkpoint-2").mkdir(parents=True)
    (run / "checkpoint-2" / "config.json").write_text("{")
    arguments = ("--policy", trained / "mild.yaml", "--model", model_folder, "--out", tmp_path / "model", "--resume")
    result = cli("train", *arguments, *SMALL)
    assert result.exit_code == 0, result.stderr
    assert "continuing from the beginning of digits: no checkpoint was finished" in result.stderr
    whole, again = ((folder / "model" / "model.safetensors").read_bytes() for folder in (trained, tmp_path))
    assert sha256(whole).hexdigest() == sha256(again).hexdigest()


@pytest.mark.parametrize(
    ("where", "raised"),
    [
        ("torch.save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")),
        ("transformers.modeling_utils.safe_save_file", SafetensorError("I/O error: No space left (os error 28)")),
        ("transformers.modeling_utils.safe_save_file", OSError(30, "Read-only file system")),
    ],
)
def test_a_full_disk_is_one_line(trained, model_folder, cli, tmp_path, monkeypatch, where, raised) -> None:
    def full(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(where, full)
    arguments = ("--policy", trained / "mild.yaml", "--model", model_folder, "--out", tmp_path, *SMALL, "--steps", 1)
    result = cli("train", *arguments)
    assert (result.exit_code, isinstance(result.exception, SystemExit)) == (2, True)
    assert result.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'run'}: ")


def test_the_log_has_every_loss(trained) -> None:
    rows = [json.loads(line) for line in (trained / "model" / "training-log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 4
    assert rows[-1]["train_loss"] > 0


def test_a_second_run_in_the_same_folder_is_refused(trained, refused) -> None:
    arguments = ("train", "--policy", trained / "mild.yaml", "--out", trained / "model", *SMALL)
    assert "--resume" in refused(*arguments, "--model", trained / "model")


def test_there_must_be_something_to_resume(trained, refused, tmp_path) -> None:
    assert "leave out --resume" in refused("train", "--policy", trained / "mild.yaml", "--out", tmp_path, "--resume")


def test_a_policy_for_another_model_is_refused(refused, tmp_path) -> None:
    assert "rescale" in refused("train", "--policy", "hidrop-64", "--out", tmp_path)


def test_without_accelerate_the_extra_is_named(refused, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("dropflow_lab.console.commands.train.find_spec", lambda _: None)
    assert "dropflow[train]" in refused("train", "--policy", "digits-mild", "--out", tmp_path)


def test_a_folder_of_questions_is_trained_on(trained, model_folder, cli, tmp_path) -> None:
    write_folder(tmp_path / "data", "train", 6)
    arguments = ("--policy", trained / "mild.yaml", "--model", model_folder, "--out", tmp_path / "model", *SMALL)
    result = cli("train", "--data", tmp_path / "data", *arguments)
    assert json.loads(result.stdout)["steps"] == 4
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, tmp_path / "model"))
    assert [name for name in before if not torch.equal(before[name].float(), after[name])]


def test_questions_about_one_picture_go_together(tmp_path) -> None:
    table = write_folder(tmp_path, "train", 2)
    one, two = (json.loads(line) for line in table.read_text().splitlines())
    lines = [one | {"question": f"q{n}", "answer": f"a{n}"} for n in range(3)]
    table.write_text("\n".join(json.dumps(line) for line in [lines[0], two, *lines[1:]]))
    dialogues = FolderDialogues(read_samples(tmp_path, 9), rounds=2)
    assert [dialogues[n].rounds for n in range(len(dialogues))] == [
        (("q0", "a0"), ("q1", "a1")),
        (("q2", "a2"),),
        ((two["question"], two["answer"]),),
    ]
    assert dialogues[1].images[0].size == dialogues[2].images[0].size
    table.write_text(json.dumps(one | {"images": [two["image"]]}))
    assert len(FolderDialogues(read_samples(tmp_path, 9), rounds=1)[0].images) == 2
    table.write_text(json.dumps(one | {"answer": None}))
    with pytest.raises(InputError, match="expected an answer in every line, found none where"):
        FolderDialogues(read_samples(tmp_path, 9), rounds=1)


LEARNING = (
    "name: learning\ntuned_for: {layers: 4, visual_tokens: 144}\n"
    "stages:\n"
    "  pyramid: {use: hidrop/concave-pyramid, keep: {1: 72, 2: 36}, learn: true, budget: {average_tokens: 60}}\n"
)


def test_a_schedule_is_learned_alone_resumed_and_written_as_a_plain_policy(model_folder, cli, tmp_path) -> None:
    """A resumed run ends with the same ratios; the model is untouched; the plain policy keeps the budget."""
    policy = tmp_path / "learning.yaml"
    policy.write_text(LEARNING)
    arguments = ("train", "--policy", policy, "--model", model_folder, "--recipe", "learn", "--rate", 0.1, *SMALL)
    assert cli(*arguments, "--out", tmp_path / "whole").exit_code == 0
    assert set(load_file(tmp_path / "whole" / "dropflow.safetensors")) == {"pyramid.logits"}
    run, own = tmp_path / "model" / "run" / "learn", tmp_path / "whole" / "run" / "learn"
    shutil.copytree(own / "checkpoint-2", run / "checkpoint-2")
    shutil.copy(own.parent / "settings.json", run.parent)
    result = cli(*arguments, "--out", tmp_path / "model", "--resume")
    assert result.exit_code == 0, result.stderr
    weights = [(tmp_path / name / "dropflow.safetensors").read_bytes() for name in ("whole", "model")]
    assert weights[0] == weights[1]
    start, end = (load_file(folder / "dropflow.safetensors") for folder in (run / "checkpoint-2", tmp_path / "model"))
    assert not torch.equal(start["pyramid.logits"], end["pyramid.logits"])
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, tmp_path / "model"))
    assert all(torch.equal(before[name].float(), value) for name, value in after.items())
    learned = dropflow.load_policy(tmp_path / "model" / "learned.yaml")
    options = learned.stages["pyramid"].options.model_dump(exclude_defaults=True)
    assert (learned.name, set(options)) == ("learning-learned", {"keep"})
    assert 144 + options["keep"][1] + 2 * options["keep"][2] in (239, 240)
    (run / "checkpoint-4" / "dropflow.safetensors").unlink()
    with pytest.raises(PolicyError, match="not the weights of stages"):
        resumed(tmp_path / "model")


def resumed(folder: Path) -> None:
    """Load the last checkpoint of a run into its model."""
    model, _ = load_model(folder)
    with dropflow.attach(model):
        load_weights(model, folder / "run" / "learn" / "checkpoint-4")


def test_a_policy_with_nothing_to_learn_is_refused(trained, model_folder, refused, tmp_path) -> None:
    arguments = (
        "--policy",
        trained / "mild.yaml",
        "--model",
        model_folder,
        "--recipe",
        "learn",
        "--out",
        tmp_path / "m",
    )
    line = refused("train", *arguments, *SMALL)
    assert "stages.learn.train: no stage of the policy has anything to learn" in line
