"""Writes the embedded questions as a task for lmms-eval: `python -m dropflow_lmms.digits DIR`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from dropflow.errors import DropflowError
from dropflow_lab.digits.data.dataset import write_folder

TASK = "dropflow_digits"
"""Name of the task."""
_DATA = "{test: data.jsonl}"


def write_task(folder: Path, count: int, seed: int = 0) -> None:
    """Write pictures, questions and the task that asks them to `folder`, which is what `--include_path` takes.

    Raises `ImportError` without the extra `digits`.
    """
    table = write_folder(folder, "test", count, seed)
    files = resources.files("dropflow_lmms") / "digits_task"
    for name in (f"{TASK}.yaml", "digits_questions.py"):
        text = (files / name).read_text(encoding="utf-8")
        whole = json.dumps({"test": str(table.resolve())})  # lmms-eval would look for it in the folder it is run in
        (folder / name).write_text(text.replace(_DATA, whole), encoding="utf-8")


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and write the task."""
    parser = argparse.ArgumentParser(prog="python -m dropflow_lmms.digits", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the task is written")
    parser.add_argument("--questions", type=int, default=300, help="number of questions (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the questions (default: 0)")
    asked = parser.parse_args(words)
    try:
        write_task(asked.folder, asked.questions, asked.seed)
    except (DropflowError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {asked.folder}: --tasks {TASK} --include_path {asked.folder}")


if __name__ == "__main__":
    main()
