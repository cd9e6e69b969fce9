"""Recipes: read and checked without torch, every fault named with what is valid."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dropflow_lab.errors import InputError
from dropflow_lab.finetune.recipe_file import load_recipe, recipe_files

HEAVY = ("torch", "transformers", "numpy", "accelerate")
WRONG = """
extends: digits
polcy: hidrop-64
dense: {shar: 3}
stages:
  digits: {stps: 3, optimizer: {nam: adamw, rate: fast}, train: [projectr]}
"""


def recipe(folder: Path, text: str, name: str = "own") -> str:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return str(path)


def test_shipped_recipes_and_their_policies_are_valid_without_torch() -> None:
    program = (
        "import json, sys\n"
        "from dropflow_lab.console.cli import app\n"
        "said = []\n"
        f"for name in {list(recipe_files())}:\n"
        "    try:\n"
        "        app(['train', '--check', '--recipe', name, '--policy', 'hidrop-64'])\n"
        "    except SystemExit as end:\n"
        "        said.append(end.code)\n"
        f"print(json.dumps([said, [name for name in {HEAVY} if name in sys.modules]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[0] * len(recipe_files()), []]
    assert set(recipe_files()) == {"digits", "hidrop", "learn"}


def test_every_fault_is_one_line_with_the_nearest_name_and_exit_code_2(cli, tmp_path) -> None:
    began = time.process_time()
    result = cli("train", "--recipe", recipe(tmp_path, WRONG), "--out", tmp_path / "out")
    assert time.process_time() - began < 1
    assert (result.exit_code, result.stdout) == (2, "")
    assert set(result.stderr.splitlines()) == {
        "error: polcy: unknown entry; did you mean 'policy'?",
        "error: dense.share: field required",
        "error: dense.shar: unknown entry; did you mean 'share'?",
        "error: stages.digits.stps: unknown entry; did you mean 'steps'?",
        "error: stages.digits.optimizer.nam: unknown entry; did you mean 'name'?",
        "error: stages.digits.optimizer.rate: input should be a valid number, unable to parse string as a number, got "
        "'fast'",
        "error: stages.digits.train: no part 'projectr'; did you mean 'projector'? (a pattern of names contains a *), "
        "got ['projectr']",
    }
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("stages: {one: {data: d, optimizer: {rate: 1}}}", "stages.one: expected either `steps` or `epochs`"),
        ("stages: {one: {data: d, steps: 1, epochs: 1, optimizer: {rate: 1}}}", "either `steps` or `epochs`"),
        ("stages: {one: {data: digits, epochs: 1, optimizer: {rate: 1}}}", "stages.one: expected `steps`: the digits"),
        ("stages: {one: {data: d, steps: 1, optimizer: {name: muon, rate: 1, weight_decay: 1}}}", "muon has a weight"),
        ("parallel: fsdp2\nstages: {one: {data: d, steps: 1, optimizer: {name: muon, rate: 1}}}", "needs whole matri"),
        (
            "dense: {share: 0.5}\nstages: {one: {data: d, steps: 1, train: [stages], optimizer: {rate: 1}}}",
            "stages.one.train: the steps of `dense` run without the policy",
        ),
        (
            "parallel: fsdp2\nstages: {one: {data: d, steps: 1, train: [language, stages], optimizer: {rate: 1}}}",
            "stages.one.train: fsdp2 does not divide what the policy's stages learn; use ddp",
        ),
        ("stages: {}", "stages: "),
        ("stages: {one: {data: '${HOME}', steps: 1, optimizer: {rate: 1}}}", "no entry 'HOME' in this recipe"),
        ("stages: {one: ]\n", "a recipe holds only mappings, lists, numbers and text"),
        (
            "stages: {one: {data: d, steps: 1, optimizer: {rate: 1, betas: [0.9, 1.5]}}}",
            "stages.one.optimizer.betas.1: input should be less than 1, got 1.5",
        ),
        ("stages: {settings.json: {data: d, steps: 1, optimizer: {rate: 1}}}", "give the stage another name"),
        ("extends: nope\n", "nope: no such recipe; valid: digits, hidrop"),
        ("extends: ./own.yaml\n", "inherits from itself"),
        ("- a\n", "expected a recipe, a mapping with `stages`"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InputError) as refused:
        load_recipe(recipe(tmp_path, text))
    assert told in str(refused.value)


def test_a_recipe_that_extends_another_changes_what_it_names(tmp_path) -> None:
    own = recipe(
        tmp_path, "extends: hidrop\nstages:\n  projector: {data: a, epochs: null, steps: 7}\n  all: {data: b}\n"
    )
    found, parent = load_recipe(own), load_recipe("hidrop")
    assert (found.name, found.policy, list(found.stages)) == ("own", "hidrop-64", ["projector", "all"])
    assert found.stages["projector"] == parent.stages["projector"].model_copy(
        update={"data": "a", "epochs": None, "steps": 7}
    )
    assert found.stages["all"] == parent.stages["all"].model_copy(update={"data": "b"})


def test_options_of_the_command_change_every_stage() -> None:
    changes: dict[str, Any] = {"seed": 3, "stages": {"steps": 5, "epochs": None, "optimizer": {"rate": 0.5}}}
    found = load_recipe("hidrop", changes)
    assert found.seed == 3
    assert [(stage.steps, stage.epochs, stage.optimizer.rate) for stage in found.stages.values()] == [
        (5, None, 0.5)
    ] * 2
    assert {stage.optimizer.schedule for stage in found.stages.values()} == {"cosine"}


@pytest.mark.parametrize(("option", "value"), [("--seed", 2**32), ("--steps", 10**19), ("--rate", 1e300)])
def test_a_number_that_nothing_can_count_to_is_refused(refused, tmp_path, option, value) -> None:
    line = refused("train", "--policy", "digits-mild", "--out", tmp_path / "out", option, value)
    assert f"{option[2:]}: expected a number from -2,147,483,647 to 2,147,483,647" in line
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_a_policy_needs_one(refused, tmp_path) -> None:
    assert "the recipe digits names none; give --policy" in refused("train", "--out", tmp_path)
    assert "--out: missing" in refused("train", "--policy", "digits-mild")
