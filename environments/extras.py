"""Install every extra alone in a fresh environment, and use once what it is for.

`python environments/extras.py dist/dropflow-*.whl [EXTRA ...]`; `base` is no extra at all.
Prints the seconds of each, and ends with exit code 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

from constraints import merged

ROOT = Path(__file__).parents[1]
BASE = "base"
WITH_ALL = ("dev",)
"""Extras of developers, which hold the others."""
LAB = "from dropflow_lab.digits.checkpoints.model import load, sample_image\n"
ASKED = """
from dropflow_lab.inputs.prompts import build_inputs, generate
import dropflow
model, processor = load("hidrop")
inputs = build_inputs(processor, [([sample_image()], "what digit is yellow ?")])
with dropflow.attach(model) as flow:
    assert generate(model, processor, inputs, 4) == ["8"]
"""
SERVED = """
import json, urllib.request
from dropflow_lab.inputs.models import load_model
from dropflow_lab.serve.keys import Keys
from dropflow_lab.serve.limits import Limits
from dropflow_lab.serve.names import Names
from dropflow_lab.serve.server import Server, serving
with serving(Server(*load_model(), Names.of("digits", []), Limits(), Keys([]), "127.0.0.1", 0)) as server:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/v1/models") as reply:
        assert json.load(reply)["data"][0]["id"] == "digits"
"""
TUNED = """
import tempfile
from pathlib import Path
from dropflow_lab.inputs.data import read_samples
from dropflow_lab.tune.study import require_optuna
from dropflow_lab.compare.figure import require_matplotlib
import optuna
require_optuna(), require_matplotlib()
study = optuna.create_study()
study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
"""
DIGITS = "dropflow digits evaluate --questions 10 --json"
TRAINED = "dropflow train --policy hidrop-digits --steps 1 --batch 2 --rounds 1 --out {folder}/trained"
LMMS = "--model dropflow --model_args pretrained=hidrop --tasks dropflow_digits --include_path {folder}/task"
CHECKS: dict[str, tuple[str, ...]] = {
    BASE: ("dropflow run --json", "python:" + LAB + ASKED),
    "digits": (DIGITS,),
    "docs": ("python -m mkdocs build --strict --quiet --site-dir {folder}/site",),
    "figures": ("python:" + LAB + ASKED + "    flow.report().plot()\n",),
    "flash": ("python:import flash_attn",),
    "lmms": (
        "python -m dropflow_lmms.digits {folder}/task --questions 2",
        f"python -m lmms_eval {LMMS} --device cpu --output_path {{folder}}/results",
    ),
    "serve": ("python:" + SERVED,),
    "train": (TRAINED,),
    "tune": ("python:" + TUNED,),
}
"""Extra -> commands that use it; `python:` begins a program, `{folder}` is an empty folder."""
NEEDS = {"flash": "nvidia-smi"}
"""Extra -> a tool of what it runs on: it is left out where that is not installed."""


def extras() -> list[str]:
    """Extras of pyproject.toml that users choose from."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return sorted(set(project["optional-dependencies"]) - set(WITH_ALL))


def check(extra: str, wheel: Path) -> None:
    """Install the wheel with one extra in an environment of its own, and run the extra's commands.

    Raises `CalledProcessError` for what fails.
    """
    with tempfile.TemporaryDirectory(prefix=f"dropflow-{extra}-") as made:
        folder = Path(made)
        python = str(folder / "venv" / "bin" / "python")
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(merged(extra)), encoding="utf-8")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        install = [*pip, "install", "--no-compile", "--constraint", str(constraints)]
        _call([sys.executable, "-m", "venv", str(folder / "venv")], folder)
        _call([*install, "torch"], folder)
        if extra == "flash":  # its package asks the installed torch how to build itself
            install.append("--no-build-isolation")
        _call([*install, str(wheel) if extra == BASE else f"{wheel}[{extra}]"], folder)
        if extra == "lmms":  # torchvision's wheel is made for CUDA: it breaks on a CPU build of torch
            _call([*pip, "uninstall", "--yes", "torchvision"], folder)
        _call([*pip, "check"], folder, may_fail=extra == "lmms")
        for command in CHECKS[extra]:
            _call(_words(command, folder), ROOT if extra == "docs" else folder)
        if extra == "lmms":
            (results,) = folder.glob("results/**/*_results.json")
            assert json.loads(results.read_text())["throughput"]["avg_prompts_of_all_ranks"] == 2


def _words(command: str, folder: Path) -> list[str]:
    home = folder / "venv" / "bin"
    if command.startswith("python:"):
        return [str(home / "python"), "-c", command.removeprefix("python:")]
    name, *words = command.split()
    return [str(home / name), *(word.replace("{folder}", str(folder)) for word in words)]


def _call(words: Sequence[str], folder: Path, *, may_fail: bool = False) -> None:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(Path.home()),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
        "OMP_NUM_THREADS": "1",
        "NO_MKDOCS_2_WARNING": "1",
    } | {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode and not may_fail:
        print(" ".join(words)[:300], done.stdout[-3000:], done.stderr[-3000:], sep="\n", file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, list(words)[:3])


def main() -> int:
    """Check the extras named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("extras", nargs="*", help="by default all, and `base`")
    asked = parser.parse_args()
    failed = []
    for extra in asked.extras or [BASE, *extras()]:
        tool = NEEDS.get(extra)
        if tool and not shutil.which(tool):
            print(f"{extra}: left out, {tool} is not installed", flush=True)
            continue
        began = time.monotonic()
        try:
            check(extra, asked.wheel.resolve())
        except subprocess.CalledProcessError as error:
            failed.append(extra)
            print(f"{extra}: FAILED: {error}", flush=True)
        else:
            print(f"{extra}: {time.monotonic() - began:.0f} s", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
