"""Trains a model once without a stop, and once with children that are killed at random moments and then resumed.

A program by itself, so that the children are forked from a process in which torch has started no thread yet.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

MODULES = (
    "dropflow.engine.attach.attach",
    "dropflow_lab.console.cli",
    "dropflow_lab.digits.training.attention",
    "dropflow_lab.finetune.train",
    "dropflow_lab.inputs.data",
    "dropflow_lab.inputs.models",
)
"""What every run imports, most of the time that a short one takes."""


def main(model: str, policy: str, out: str, kills: str, seed: str, *options: str) -> None:
    _prepare()
    arguments = ["train", "--model", model, "--policy", policy, *options]
    whole, stopped = Path(out) / "whole", Path(out) / "stopped"
    began = time.monotonic()
    _finish(_start([*arguments, "--out", str(whole)]))
    took, dice = time.monotonic() - began, random.Random(int(seed))
    killed = 0
    for _ in range(int(kills)):
        killed += _killed(_resumed(arguments, stopped), dice.uniform(0.1, 0.9) * took)
        while not killed:  # it ended first, on a machine that is less busy by now
            took /= 2
            shutil.rmtree(stopped)
            killed += _killed(_resumed(arguments, stopped), dice.uniform(0.1, 0.9) * took)
    _finish(_start(_resumed(arguments, stopped)))
    print(json.dumps({"killed": killed, "whole": _digest(whole), "stopped": _digest(stopped)}))


def _prepare() -> None:
    """Import and read once what all children need."""
    for module in MODULES:
        importlib.import_module(module)
    from dropflow.backbone.compiling import leave_uncompiled
    from dropflow_lab.digits.data.glyphs import digit_bank

    leave_uncompiled()
    digit_bank()
    gc.freeze()  # what is imported is not scanned again in every child


def _killed(arguments: list[str], seconds: float) -> bool:
    """Kill a run after some seconds; return whether that was before its end."""
    child = _start(arguments)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"a run that was to be killed ended with {code}")
    return code != 0


def _resumed(arguments: list[str], out: Path) -> list[str]:
    begun = (out / "run" / "settings.json").exists()
    return [*arguments, "--out", str(out), *(["--resume"] if begun else [])]


def _start(arguments: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    from dropflow_lab.console.cli import app

    os.dup2(2, 1)
    try:
        app(arguments)
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        os._exit(1)


def _finish(child: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        sys.exit(f"a run that was not killed ended with {code}")


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
