"""`dropflow train` on models of several families and on a folder of questions, stage by stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import FAMILIES, gemma3, logged, squares, weights
from torch.nn.functional import cross_entropy, kl_div

import dropflow
from dropflow_lab.errors import InputError
from dropflow_lab.finetune import Collator, FolderDialogues
from dropflow_lab.finetune.collate import packing_fault
from dropflow_lab.finetune.epochs import Epochs
from dropflow_lab.finetune.optimizer import make_schedule
from dropflow_lab.finetune.parts import parts_of, train_parts
from dropflow_lab.finetune.recipe import OptimizerOptions
from dropflow_lab.finetune.trainer import is_dense
from dropflow_lab.inputs.data import read_samples
from dropflow_lab.inputs.models import load_model
from dropflow_lab.inputs.prompts import build_inputs

pytest.importorskip("accelerate")

POLICY = {"stages": {"pyramid": {"use": "pyramiddrop/pyramid", "keep": {1: 0.5, 2: 0.25}}}}
ADAMW = {"rate": 1.0e-3, "warmup": 0}
GEMMA3_ALWAYS = pytest.mark.parametrize(
    "model", [pytest.param("llava", marks=pytest.mark.slow), "gemma3"], indirect=True
)
"""The family whose processor says more of every token; the other one with `-m slow`."""


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return squares(tmp_path_factory.mktemp("squares") / "data", pairs=True)


@pytest.fixture
def trained(cli: Any, tmp_path: Path) -> Any:
    """Train by a recipe of these entries; returns the folder."""

    def call(model: Path, out: str = "out", *options: str, **entries: Any) -> Path:
        recipe = tmp_path / "recipe.yaml"
        shared = {"policy": POLICY, "model": str(model), "precision": "fp32", "save_every": 1, "log_every": 1}
        recipe.write_text(yaml.safe_dump(shared | entries))
        result = cli("train", "--recipe", recipe, "--out", tmp_path / out, *options)
        assert result.exit_code == 0, result.stderr
        return tmp_path / out

    return call


def batch_of(model: Path, data: Path, step: int, size: int, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """A model folder, loaded, and what it is trained on in a step."""
    loaded, processor = load_model(model)
    dialogues = FolderDialogues(read_samples(data, 99), 1)
    samples = Epochs(dialogues, 99 * size, seed)
    return loaded.float(), Collator(processor)([samples[step * size + n] for n in range(size)])


def two_stages(data: Path) -> dict[str, Any]:
    first = {"data": str(data), "train": ["projector"], "steps": 1, "batch": 2, "optimizer": ADAMW}
    return {"first": first, "second": first | {"train": ["projector", "language"], "steps": 2, "micro_batch": 1}}


def test_each_stage_trains_its_parts_and_starts_from_the_one_before(trained, model, data) -> None:
    folder = trained(model, stages=two_stages(data))
    given, end = weights(model), weights(folder)
    middle = weights(folder / "run" / "first" / "checkpoint-1")
    moved = {name for name in given if not torch.equal(given[name], middle[name])}
    assert moved == {name for name in given if "multi_modal_projector" in name}
    moved = {name for name in given if not torch.equal(middle[name], end[name])}
    assert moved == {name for name in given if "vision" not in name}
    loaded, batch = batch_of(folder / "run" / "first" / "checkpoint-1", data, 0, 2)
    with dropflow.attach(loaded.train(), POLICY):
        assert logged(folder)[1] == pytest.approx(float(loaded(**batch).loss.detach()), rel=1e-5)
    loaded, batch = batch_of(model, data, 0, 2)
    assert len(batch["pixel_values"]) == 3
    with dropflow.attach(loaded.train(), POLICY):
        assert logged(folder)[0] == pytest.approx(float(loaded(**batch).loss.detach()), rel=1e-5)
    final, _ = load_model(folder)
    with dropflow.attach(final) as flow:
        assert flow.policy.to_dict()["stages"] == dropflow.load_policy(POLICY).to_dict()["stages"]


@GEMMA3_ALWAYS
def test_a_run_that_is_stopped_in_either_stage_ends_with_the_same_bits(trained, model, data, tmp_path) -> None:
    folder = trained(model, stages=two_stages(data))
    whole = (folder / "model.safetensors").read_bytes()
    for number, lost in enumerate((["second/checkpoint-2"], ["second"])):
        resumed = tmp_path / f"resumed-{number}"
        shutil.copytree(folder / "run", resumed / "run")
        for name in lost:
            shutil.rmtree(resumed / "run" / name)
        trained(model, resumed.name, "--resume", stages=two_stages(data))
        assert (resumed / "model.safetensors").read_bytes() == whole
        log = [json.loads(row) for row in (resumed / "training-log.jsonl").read_text().splitlines()]
        assert [row["stage"] for row in log if "loss" in row] == ["first", "second", "second"]


def test_prompts_are_those_of_inference_and_labels_the_answers(model, data) -> None:
    _, processor = load_model(model)
    samples = read_samples(data, 99)
    batch = Collator(processor)([FolderDialogues(samples, 1)[n] for n in (0, 1)])
    for row, sample in enumerate(samples[:2]):
        asked = build_inputs(processor, [(sample.images(), sample.question)])["input_ids"][0]
        labels, ids = batch["labels"][row], batch["input_ids"][row]
        assert torch.equal(ids[: len(asked)], asked)
        said = labels != -100
        assert said.nonzero()[0] == len(asked)
        assert torch.equal(labels[said], ids[said])
        expected = processor.tokenizer(f" {sample.answer} </s>", add_special_tokens=False)["input_ids"]
        assert labels[said].tolist() == expected
    assert batch["attention_mask"].sum(1).tolist()[0] < batch["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("model", "more"),
    [
        pytest.param("llava", {}, marks=pytest.mark.slow),
        ("llava", {"gradient_checkpointing": True}),
        ("gemma3", {}),
        pytest.param("gemma3", {"gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
    ids=["llava-plain", "llava-checkpointing", "gemma3-plain", "gemma3-checkpointing"],
    indirect=["model"],
)
def test_dense_steps_learn_what_the_policy_answers_too(trained, model, data, more) -> None:
    stage = {"data": str(data), "steps": 4, "batch": 2, "optimizer": {"rate": 0.0}} | more
    if "gradient_checkpointing" in more:
        stage["micro_batch"] = 1
    folder = trained(model, stages={"only": stage}, dense={"share": 0.5, "distill": 2.0})
    for step, loss in enumerate(logged(folder)):
        loaded, batch = batch_of(model, data, step, 2)
        asked = batch["labels"][:, 1:] != -100
        with torch.no_grad():
            with dropflow.attach(loaded.train(), POLICY):
                pruned = loaded(**batch)
            plain = loaded(**batch)
        given, taught = (out.logits[:, :-1][asked].float().log_softmax(-1) for out in (plain, pruned))
        entropy = cross_entropy(given, batch["labels"][:, 1:][asked])
        apart = kl_div(given, taught, reduction="batchmean", log_target=True)
        assert apart > 1e-4
        expected = entropy + 2 * apart if step % 2 else pruned.loss
        assert loss == pytest.approx(float(expected), rel=1e-5)
    assert all(norm > 0 for norm in logged(folder, "grad_norm"))
    assert "dropflow" not in json.loads((folder / "config.json").read_text())


@GEMMA3_ALWAYS
def test_checkpointing_changes_no_gradient(trained, model, data) -> None:
    stage = {"data": str(data), "steps": 2, "batch": 2, "optimizer": ADAMW}
    plain = trained(model, "plain", stages={"only": stage}, dense={"share": 0.5})
    other = trained(model, "other", stages={"only": stage | {"gradient_checkpointing": True}}, dense={"share": 0.5})
    for name in ("loss", "grad_norm"):
        assert logged(other, name) == pytest.approx(logged(plain, name), rel=1e-5)


def test_dense_steps_are_spread_evenly() -> None:
    assert [n for n in range(12) if is_dense(n, 0.25)] == [3, 7, 11]
    assert sum(is_dense(n, 0.1) for n in range(1000)) == 100


def test_every_sample_comes_once_an_epoch_whatever_the_batch(data) -> None:
    dialogues = FolderDialogues(read_samples(data, 99), 1)
    samples = Epochs(dialogues, 14, seed=3)
    asked = [(samples[n].rounds, samples[n].images[0].getpixel((0, 0))) for n in range(14)]
    for start in (0, 6):
        assert len(set(asked[start : start + 6])) == 6
    assert asked[:6] != asked[6:12]
    assert asked[13] == (Epochs(dialogues, 99, seed=3)[13].rounds, samples[13].images[0].getpixel((0, 0)))
    with pytest.raises(IndexError, match="got 14"):
        samples[14]


def test_parts_cover_the_model_and_patterns_choose_from_it(model) -> None:
    loaded, _ = load_model(model)
    parts = parts_of(loaded)
    assert parts.keys() == dict(loaded.named_parameters()).keys()
    assert {name for name, part in parts.items() if part == "vision"} == {n for n in parts if "vision_tower" in n}
    assert {name for name, part in parts.items() if part == "projector"} == {n for n in parts if "projector" in n}
    chosen = train_parts(loaded, ["projector", "*.language_model.layers.3.*"], "train")
    assert {n for n, w in loaded.named_parameters() if w.requires_grad} == set(chosen)
    assert chosen == sorted(n for n in parts if "projector" in n or "language_model.layers.3." in n)
    with pytest.raises(InputError, match=r"train: '\*adapter\*' selects no parameter"):
        train_parts(loaded, ["*adapter*"], "train")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [0.0, 0.5, 1.0, 0.853553, 0.5, 0.146447]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("hold", [0.5, 1.0, 1.0, 1.0, 0.666667, 0.333333]),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule: Any, expected: list[float]) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    options = OptimizerOptions(rate=2.0, schedule=schedule, warmup=0.25)
    optimizer = torch.optim.SGD([weight], lr=2.0)
    course = make_schedule(optimizer, options, 6)
    found = []
    for _ in range(6):
        found.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        course.step()
    assert found == pytest.approx(expected, abs=1e-6)


def test_what_does_not_fit_the_model_is_refused_before_anything_is_written(refused, tmp_path, data) -> None:
    folder = gemma3(tmp_path / "gemma3")
    arguments = ("train", "--policy", "digits-mild", "--model", folder, "--data", data, "--out", tmp_path / "out")
    line = refused(*arguments)
    assert "stages.digits.rounds: 12 rounds cannot be packed for this model: it has layers that do not attend" in line
    own = tmp_path / "own.yaml"
    own.write_text("extends: digits\nstages: {digits: {rounds: 1, batch: 9, micro_batch: 2}}\n")
    assert "9 samples cannot be divided into forwards of 2 on 1 processes" in refused(*arguments, "--recipe", own)
    own.write_text("extends: digits\nparallel: fsdp2\nstages: {digits: {rounds: 1, optimizer: {name: adamw}}}\n")
    assert "parallel: fsdp2 needs processes started by torchrun" in refused(*arguments, "--recipe", own)
    assert not (tmp_path / "out").exists()
    loaded, _ = load_model(FAMILIES["llava"](tmp_path / "llava"))
    assert packing_fault(dropflow.backbone_for(loaded)) is None


def test_a_model_of_the_hub_must_be_in_the_cache(refused, tmp_path, data) -> None:
    line = refused("train", "--policy", "digits-mild", "--model", "nobody/no-model", "--data", data, "--out", tmp_path)
    assert "nobody/no-model: expected a model folder with a config.json, or the name of a model in the local" in line
