"""The commands of the pages on lmms-eval run, with a tiny LLaVA and the local task in the place of large ones."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from documents import blocks

pytest.importorskip("lmms_eval", reason="lmms-eval is of the extra `lmms`")

from dropflow_lab.digits.checkpoints.model import build_model, export
from dropflow_lmms.digits import TASK, write_task

pytestmark = pytest.mark.timeout(1500)
REPRODUCE, PAGE = "docs/reproduce.md", "docs/lmms-eval.md"


def commands(page: str, number: int) -> list[str]:
    """The command lines of a page's sh block, with its variables filled in."""
    known: dict[str, str] = {}
    found = []
    for line in blocks(page, "sh")[number].text.replace("\\\n", " ").splitlines():
        exported = re.match(r"export (\w+)=(.*)$", line)
        if exported:
            known[exported[1]] = exported[2].strip('"')
        else:
            found.append(re.sub(r"\$(\w+)", lambda name: known[name[1]], line))
    return found


def run(command: str, folder: Path) -> None:
    """Run a command line in a folder, without a network."""
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    assert words[0] == "python"
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "hub"),
    }
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=os.environ | offline, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny LLaVA, `model`, and the local task, `task`."""
    folder = tmp_path_factory.mktemp("pages")
    export(build_model(), folder / "model")
    write_task(folder / "task", 2)
    return folder


ASKED = [line for line in commands(REPRODUCE, 0) if "policy=" in line]
IN_SHORT = ("policy=none", "policy=mustdrop-64")


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, id=name[1], marks=[] if name[0] in IN_SHORT else [pytest.mark.slow])
        for line in ASKED
        if (name := re.search(r"policy=([\w.-]+)", line))
    ],
)
def test_the_commands_that_reproduce_a_number(line: str, stage: Path) -> None:
    own = line.replace("pretrained=llava-hf/llava-1.5-7b-hf,dtype=float16", f"pretrained={stage / 'model'}")
    own = own.replace("--tasks gqa,pope,textvqa_val", f"--tasks {TASK} --include_path {stage / 'task'} --device cpu")
    if "policy=none" not in own:
        own = re.sub(r"(policy=[\w.-]+)", r"\1,overrides=rescale=true", own)
    assert own.count(str(stage)) == 2
    run(own, stage)
    out = re.search(r"--output_path (\S+)", own)
    assert out is not None
    (results,) = (stage / out[1]).rglob("*_results.json")
    told = json.loads(results.read_text())["throughput"]
    assert told["avg_prompts_of_all_ranks"] == 2
    dense = "policy=none" in own
    assert (told["avg_visual_tokens_per_layer"] == 144) == dense


def test_the_commands_about_the_local_task(tmp_path: Path) -> None:
    first, second = commands(PAGE, 1)
    run(first.replace("--questions 300", "--questions 2"), tmp_path)
    run(f"{second} --device cpu", tmp_path)
    (results,) = (tmp_path / "results").rglob("*_results.json")
    assert json.loads(results.read_text())["throughput"]["avg_visual_tokens_per_layer"] == 36
