"""The smoke recipe runs through all stages, and a killed run ends with the weights of an unbroken one."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dropflow_lab.compare.digits_accuracy import evaluate
from dropflow_lab.digits.checkpoints.model import build_model, checkpoint_path
from dropflow_lab.digits.training import optimizers, train_language
from dropflow_lab.digits.training.packing import draw_batch
from dropflow_lab.digits.training.recipe import PLAIN, SMOKE, Recipe
from dropflow_lab.digits.training.train import train
from dropflow_lab.digits.training.train_language import LanguagePhase
from dropflow_lab.digits.training.train_vision import VisionPhase, patch_labels

TINY = replace(
    SMOKE,
    vision_steps=4,
    vision_validate_every=2,
    short_steps=2,
    full_steps=2,
    mixed_steps=4,
    language_validate_every=2,
    language_validation=10,
)


class KilledError(Exception):
    """Stands for a kill at a given step."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return train(tmp_path_factory.mktemp("unbroken"), recipe=TINY)


def _log(folder):
    lines = (folder / "training-log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize(
    ("phase", "save_seconds"),
    [
        (VisionPhase, 0.0),
        (LanguagePhase, 60.0),  # it goes back to the end of the other phase
        pytest.param(LanguagePhase, 0.0, marks=pytest.mark.slow),
        pytest.param(VisionPhase, 60.0, marks=pytest.mark.slow),
    ],
)
def test_killed_run_ends_with_the_same_weights(phase, save_seconds, unbroken, tmp_path, monkeypatch):
    step = phase.step

    def killed_at_three(self, index):
        if index == 3:
            raise KilledError
        return step(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(phase, "step", killed_at_three)
        with pytest.raises(KilledError):
            train(tmp_path, recipe=TINY, save_seconds=save_seconds)
    train(tmp_path, recipe=TINY, save_seconds=save_seconds, resume=True)
    assert (tmp_path / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
    assert _log(tmp_path) == _log(unbroken)


def test_finished_run_is_left_as_it_is(unbroken):
    before = load_file(unbroken / "model.safetensors")
    train(unbroken, recipe=TINY, resume=True)
    after = load_file(unbroken / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_run_is_not_overwritten_or_continued_with_other_settings(unbroken):
    with pytest.raises(FileExistsError, match="holds a training run already"):
        train(unbroken, recipe=TINY)
    with pytest.raises(ValueError, match=r"seed \(saved: 0, now: 1\), short_steps \(saved: 2, now: 3\)"):
        train(unbroken, recipe=replace(TINY, short_steps=3), seed=1, resume=True)


def test_log_has_loss_rate_time_and_validation_accuracy(unbroken):
    rows = [json.loads(line) for line in (unbroken / "training-log.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "accuracy" in row]
    assert [(row["phase"], row["step"]) for row in measured] == [
        ("vision", 2),
        ("vision", 4),
        *(("language", step) for step in (2, 4, 6, 8)),
    ]
    assert all({"loss", "learning_rate", "seconds"} <= row.keys() for row in rows)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)


def test_smoke_run_learns_in_every_stage(tmp_path):
    threads = torch.get_num_threads()
    train(tmp_path, smoke=True, test=lambda *trained: evaluate(*trained, "test", 10).to_json())
    assert torch.get_num_threads() == threads
    losses = {(row["phase"], row["step"]): row["loss"] for row in _log(tmp_path)}
    assert losses["vision", 20] < losses["vision", 10]
    assert losses["language", 60] < losses["language", 20] < losses["language", 10]
    report = json.loads((tmp_path / "test.json").read_text())
    assert report["overall"]["asked"] == 10
    for file in tmp_path.iterdir():
        if file.is_file():
            assert file.stat().st_mode & 0o777 == 0o644, file


def test_language_phase_leaves_the_tower_alone():
    model = build_model(0, decoder_layers=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    phase = LanguagePhase(model, SMOKE, 0)
    phase.step(0)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any("vision_tower" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)
    assert any("language_model.layers.1" in name for name in changed)


def test_a_plain_run_sees_every_token_and_takes_the_tower_of_the_dense_checkpoint(tmp_path, monkeypatch):
    seen = []

    def watched(model, batch, visual, kept=None, *, compact=False):
        seen.append((visual.shape[1], kept, compact))
        return packed_losses(model, batch, visual, kept, compact=compact)

    packed_losses = train_language.packed_losses
    monkeypatch.setattr(train_language, "packed_losses", watched)
    plain = replace(TINY, missing_tokens=PLAIN.missing_tokens, tower=PLAIN.tower)
    train(tmp_path, recipe=plain)
    assert set(seen) == {(144, None, False)}
    assert {row["phase"] for row in _log(tmp_path)} == {"language"}
    trained, dense = (load_file(folder / "model.safetensors") for folder in (tmp_path, checkpoint_path("dense")))
    tower = {name for name in dense if "vision_tower" in name}
    assert tower
    assert all(torch.equal(trained[name], dense[name]) for name in tower)
    with pytest.raises(ValueError, match=r"tower \(saved: dense, now: \)"):
        train(tmp_path, recipe=replace(plain, tower=""), resume=True)


def test_only_weights_of_the_mixed_stage_are_candidates():
    phase = LanguagePhase(build_model(0, decoder_layers=2), TINY, 0)
    phase.done = 4
    phase.validate()
    assert phase.best["step"] == 0
    phase.done = 5
    accuracy = phase.validate()["accuracy"]
    assert (phase.best["step"], phase.best["accuracy"]) == (5, accuracy)


def test_patch_labels_count_background_as_zero():
    batch = draw_batch("train", (0, 5), 2, room=30)
    digit, color = patch_labels(batch)
    background = (batch.owner < 0).reshape(-1)
    assert torch.equal(digit == 0, background)
    assert torch.equal(color == 0, background)
    row = int((batch.owner[0] == 1).nonzero()[0])
    assert (digit[row], color[row]) == (batch.digit[0, 1] + 1, batch.color[0, 1] + 1)


def test_learning_rate_warms_up_holds_and_falls_to_zero():
    rates = [optimizers.learning_rate(index, 1000, 2.0) for index in range(1000)]
    assert rates[0] == pytest.approx(0.05)
    assert set(rates[40:500]) == {2.0}
    assert rates[750] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.005


def test_matrices_go_to_muon_and_the_rest_to_adamw():
    model = build_model(0, decoder_layers=2)
    muon, adamw = optimizers.make_optimizers([model.model.language_model])
    shapes = {tuple(p.shape) for group in muon.param_groups for p in group["params"]}
    assert shapes == {(128, 128), (352, 128), (128, 352)}
    assert {tuple(p.shape) for group in adamw.param_groups for p in group["params"]} == {(128,), (82, 128)}


def test_default_recipe_adds_up():
    recipe = Recipe()
    assert recipe.language_steps == recipe.short_steps + recipe.full_steps + recipe.mixed_steps
