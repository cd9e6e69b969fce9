"""Several processes on one folder: the rows of one process, and nothing measured twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

COMMAND = "from dropflow_lab.console.cli import app; app()"
POLICIES = "divprune-56,vtw-16,visionzip-64,pyramiddrop,cdpruner-llm-64"


def compare(model: Path, out: Path) -> subprocess.Popen[str]:
    words = ["compare", str(model), "--policies", POLICIES, "--questions", "8", "--batch", "4", "--timed", "1"]
    words += ["--rounds", "2", "--max-new-tokens", "3", "--out", str(out), "--json"]
    return subprocess.Popen([sys.executable, "-c", COMMAND, *words], stdout=subprocess.PIPE, text=True)


def rows(told: str) -> list[dict[str, Any]]:
    """What does not differ from run to run."""
    found = json.loads(told)["rows"]
    for row in found:
        row["cost"] = {
            name: {key: value for key, value in row["cost"][name].items() if key != "peak_bytes"}
            for name in ("work", "dense")
        }
    return list(found)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_workers_one_of_them_killed_give_the_result_of_one(model_folder: Path, tmp_path: Path) -> None:
    alone = compare(model_folder, tmp_path / "one").communicate()[0]
    workers = [compare(model_folder, tmp_path / "four") for _ in range(4)]
    finished = tmp_path / "four" / "finished"
    while not (finished.is_dir() and any(path.suffix == ".lock" for path in finished.iterdir())):
        assert workers[0].poll() is None
        time.sleep(0.01)
    os.kill(workers[0].pid, signal.SIGKILL)
    told = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL, 0, 0, 0]
    assert [json.loads(one)["rows"] for one in told[2:]] == [json.loads(told[1])["rows"]] * 2  # with their times
    assert rows(told[1]) == rows(alone)
    assert {path.suffix for path in finished.iterdir()} == {".json"}
    names = [sorted(path.name for path in (tmp_path / one / "finished").iterdir()) for one in ("one", "four")]
    assert names[0] == names[1]
