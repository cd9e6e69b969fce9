"""A run that is killed and resumed ends with the weights of one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import killed_training
import pytest

from dropflow_lab.digits.data.dataset import write_folder

pytest.importorskip("accelerate")

SMALL = ("--steps", 3, "--batch", 1, "--rounds", 1, "--save-every", 1)
LONGER = ("--steps", 8, "--batch", 2, "--save-every", 1)


@pytest.fixture
def killed(tmp_path: Path, mild: Path):
    """Kill runs with some options at random moments, check the end, and return how many were killed."""

    def call(model: Path, kills: int, *options: object) -> int:
        program = (killed_training.__file__, model, mild, tmp_path / "out", kills, 0, *options)
        paths = os.pathsep.join(path for path in sys.path if path)
        done = subprocess.run(
            [sys.executable, *map(str, program)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        told = json.loads(done.stdout.splitlines()[-1])
        assert told["stopped"] == told["whole"]
        return told["killed"]

    return call


def test_killed_twice(killed, model_folder) -> None:
    assert killed(model_folder, 2, *SMALL, "--precision", "fp32") > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "options",
    [
        ("--rounds", 1, "--precision", "fp32"),
        ("--rounds", 3, "--precision", "bf16"),
        ("--rounds", 2, "--precision", "bf16", "--attention", "matmul"),
        ("--rounds", 1, "--data", "folder"),
        ("--rounds", 1, "--dropout"),
    ],
    ids=["fp32", "bf16, several rounds", "matmul", "several epochs of a folder", "dropout"],
)
def test_killed_many_times(killed, model_folder, tmp_path, options) -> None:
    if "folder" in options:
        write_folder(tmp_path / "folder", "train", 6)
        options = (*options[:-1], tmp_path / "folder")
    if "--dropout" in options:
        options, model_folder = options[:-1], shutil.copytree(model_folder, tmp_path / "model")
        config = json.loads((model_folder / "config.json").read_text())
        config["text_config"]["attention_dropout"] = 0.2
        (model_folder / "config.json").write_text(json.dumps(config))
    assert killed(model_folder, 8, *LONGER, *options) > 0
