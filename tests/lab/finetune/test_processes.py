"""A recipe trained on two ranks: by DDP and by FSDP2, with the losses of one rank, and resumed to the same bits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from families import llava, logged, squares, weights
from safetensors.torch import load_file

import dropflow
from dropflow_lab.finetune import Recipe, finetune, load_recipe, samples_of
from dropflow_lab.inputs.models import load_model

pytest.importorskip("accelerate")

RANKS = 2
RECIPE = """
policy: {{stages: {{pyramid: {{use: pyramiddrop/pyramid, keep: {{1: 0.5, 2: 0.25}}}}}}}}
model: {folder}/model
precision: fp32
save_every: 1
log_every: 1
parallel: {parallel}
stages:
  first: {{data: {folder}/data, train: [projector], steps: 1, batch: 4, optimizer: {{rate: 1.0e-3, warmup: 0}}}}
  second: {{data: {folder}/data, steps: 3, batch: 4, micro_batch: 1, gradient_checkpointing: true,
            optimizer: {{rate: 1.0e-3, warmup: 0, weight_decay: 0.1}}}}
"""

LEARNED = """
policy: {{stages: {{pyramid: {{use: hidrop/concave-pyramid, keep: {{1: 72, 2: 36}}, learn: true,
                             budget: {{average_tokens: 80}}}}}}}}
model: {folder}/model
precision: fp32
log_every: 1
dense: {{share: 0.5}}
stages:
  only: {{data: {folder}/data, train: [projector, stages], steps: 3, batch: 2, optimizer: {{rate: 1.0e-2, warmup: 0}}}}
"""
"""Stages that learn, and steps in which nothing that they learn has a gradient."""


def recipe(folder: Path, parallel: str, text: str = RECIPE) -> Recipe:
    path = folder / f"{parallel}-{os.getpid()}.yaml"
    path.write_text(text.format(folder=folder, parallel=parallel))
    return load_recipe(str(path))


def train(folder: Path, parallel: str, out: str, text: str = RECIPE, *, resume: bool = False) -> None:
    chosen = recipe(folder, parallel, text)
    model, processor = load_model(folder / "model")
    policy = dropflow.load_policy(chosen.policy or {})
    finetune(model, processor, chosen, samples_of(chosen, processor), policy, folder / out, resume=resume)


def work(folder: Path) -> None:
    """What each rank does."""
    from torch.distributed.tensor import DTensor

    from dropflow_lab.finetune.trainer import FlowTrainer

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank, divided, step = torch.distributed.get_rank(), dict[str, list[bool]](), FlowTrainer.training_step
    now = ""

    def watched(self: Any, model: Any, *arguments: Any) -> Any:
        loss = step(self, model, *arguments)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        divided.setdefault(now, []).append(
            all(isinstance(own, DTensor) and isinstance(own.grad, DTensor) for own in trained)
            and all(isinstance(own, DTensor) and own.to_local().numel() < own.numel() for own in model.parameters())
        )
        return loss

    FlowTrainer.training_step = watched
    for now in ("ddp", "fsdp2"):
        train(folder, now, now)
    if not rank:
        shutil.copytree(folder / "fsdp2/run", folder / "again/run")
        shutil.rmtree(folder / "again/run/second/checkpoint-3")
    torch.distributed.barrier()
    train(folder, "fsdp2", "again", resume=True)
    FlowTrainer.training_step = step
    train(folder, "ddp", "learned", LEARNED)
    (folder / f"divided-{rank}.json").write_text(json.dumps(divided))


pytestmark = pytest.mark.slow  # `.ci/run` runs this file by itself


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one rank and two ranks have trained."""
    from accelerate import debug_launcher

    found = tmp_path_factory.mktemp("ranks")
    llava(found / "model")
    squares(found / "data", 7, pairs=True)
    debug_launcher(work, (found,), num_processes=RANKS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        train(found, "ddp", "one")
        train(found, "ddp", "learned-one", LEARNED)
    return found


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_have_the_losses_and_weights_of_one(folder: Path, parallel: str) -> None:
    for name in ("loss", "grad_norm"):
        expected = logged(folder / "one", name)
        assert len(expected) == 4
        assert logged(folder / parallel, name) == pytest.approx(expected, rel=1e-5)
    given, one, two = weights(folder / "model"), weights(folder / "one"), weights(folder / parallel)
    assert two.keys() == one.keys()
    for name, weight in one.items():  # Adam divides by the size of a gradient, so that round-off shows where it is 0
        moved = (weight - given[name]).norm()
        assert (two[name] - weight).norm() <= 1e-3 * moved, name
    assert json.loads((folder / parallel / "config.json").read_text())["dropflow"]["stages"]


def test_stages_learn_on_two_ranks_what_they_learn_on_one_and_rest_in_dense_steps(folder: Path) -> None:
    one, two = (folder / name for name in ("learned-one", "learned"))
    for name in ("loss", "grad_norm"):
        assert len(logged(one, name)) == 3
        assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-5)
    expected, found = (load_file(own / "dropflow.safetensors")["pyramid.logits"] for own in (one, two))
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert "dropflow" not in json.loads((two / "config.json").read_text())


def test_fsdp2_divides_every_parameter_and_gradient(folder: Path) -> None:
    for rank in range(RANKS):
        told = json.loads((folder / f"divided-{rank}.json").read_text())
        assert told["fsdp2"] == [True] * len(told["fsdp2"])
        assert len(told["fsdp2"]) == 2 * (1 + 3 * 2) - 1 - 2 * 2
        assert not any(told["ddp"])


def test_a_divided_run_that_was_stopped_ends_with_the_same_bits(folder: Path) -> None:
    whole, again = ((folder / name / "model.safetensors").read_bytes() for name in ("fsdp2", "again"))
    assert again == whole
    assert logged(folder / "again") == logged(folder / "fsdp2")


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="`make test-deepspeed` brings it")
@pytest.mark.timeout(900)
def test_zero_2_has_the_losses_of_one_rank_and_resumes_to_the_same_bits(folder: Path) -> None:
    recipe(folder, "zero2")
    own = next(folder.glob("zero2-*.yaml"))

    def launch(out: str, *options: str) -> None:
        command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dropflow", "train", *options]
        done = subprocess.run(
            [sys.executable, *command, "--recipe", str(own), "--out", str(folder / out)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert done.returncode == 0, done.stderr[-3000:]

    launch("zero2")
    for name in ("loss", "grad_norm"):
        assert logged(folder / "zero2", name) == pytest.approx(logged(folder / "one", name), rel=1e-5)
    shutil.copytree(folder / "zero2/run", folder / "zero2-again/run")
    last = folder / "zero2-again/run/second/checkpoint-3"
    next(last.glob("global_step*/zero_pp_rank_1_*")).unlink()
    launch("zero2-again", "--resume")
    whole, again = ((folder / name / "model.safetensors").read_bytes() for name in ("zero2", "zero2-again"))
    assert again == whole
