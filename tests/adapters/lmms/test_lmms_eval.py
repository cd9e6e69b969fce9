"""lmms-eval's own command line, offline, on one process and on two: the answers are those of `dropflow compare`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("lmms_eval", reason="lmms-eval is of the extra `lmms`")

import dropflow
from dropflow_lab.compare.answers import Answers, ask
from dropflow_lab.compare.lineup import policy_of
from dropflow_lab.inputs.data import read_samples
from dropflow_lab.inputs.models import load_model
from dropflow_lmms.digits import TASK, write_task

pytestmark = pytest.mark.timeout(1500)
RUNS = {
    "dense": ("dense", "none"),
    "hidrop": ("dense", "hidrop-64,overrides=rescale=true"),
    "mustdrop": ("dense", "mustdrop-digits"),
    "recorded": ("hidrop", ""),
}
"""Name -> model and policy as `--model_args` has them."""
BY_TWO = [name if name == "hidrop" else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
COUNTS = [15, pytest.param(300, marks=pytest.mark.slow)]
"""Numbers of questions; two processes get unequal shares of the first."""


@dataclass(frozen=True)
class Found:
    """What lmms-eval has written about one run."""

    said: tuple[str, ...]
    score: float
    told: dict[str, float]


def evaluate(folder: Path, *words: str, ranks: int = 1, code: int = 0) -> str:
    """Run lmms-eval's command line in a folder of its own; returns what it printed."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *start, "-m", "lmms_eval", *words, "--output_path", str(folder / "out")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HOME": str(folder / "hub"), "COLUMNS": "300"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def found(folder: Path) -> Found:
    """Read the only results below a folder."""
    (results,), (samples,) = folder.rglob("*_results.json"), folder.rglob("*_samples_*.jsonl")
    result = json.loads(results.read_text())
    lines = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda one: one["doc_id"])
    assert [one["doc_id"] for one in lines] == list(range(len(lines)))
    (score,) = [one["exact_match,none"] for one in result["results"].values()]
    return Found(tuple(one["filtered_resps"] for one in lines), score, result["throughput"])


@pytest.fixture(scope="module", params=COUNTS)
def count(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def runs(count: int, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Found]:
    """Name of a run and number of processes -> what lmms-eval has written; each pair runs once."""
    task = tmp_path_factory.mktemp("task")
    write_task(task, count)
    known: dict[tuple[str, int], Found] = {}

    def run(name: str, ranks: int) -> Found:
        if (name, ranks) not in known:
            folder = tmp_path_factory.mktemp(f"{name}-{ranks}")
            model, policy = RUNS[name]
            arguments = f"pretrained={model}" + f",policy={policy}" * bool(policy)
            words = ["--model", "dropflow", "--model_args", arguments, "--tasks", TASK, "--include_path", str(task)]
            evaluate(folder, *words, "--batch_size", "8", "--device", "cpu", "--log_samples", ranks=ranks)
            known[name, ranks] = found(folder)
        return known[name, ranks]

    return run


def expected(name: str, count: int) -> tuple[Answers, float]:
    """What `dropflow compare` gets for a run: answers with their averages, and the share of right ones."""
    model, processor = load_model(Path(RUNS[name][0]))
    policies: dict[str, Callable[[], Any]] = {
        "dense": lambda: None,
        "hidrop": lambda: dropflow.load_policy("hidrop-64", ["rescale=true"]),
        "mustdrop": lambda: dropflow.load_policy("mustdrop-digits"),
        "recorded": lambda: policy_of(model),
    }
    samples = read_samples("digits", count)
    with torch.no_grad():
        answers = ask(model, processor, policies[name](), samples, batch=8, max_new_tokens=16)
    right = [sample.is_answered_by(said) for sample, said in zip(samples, answers.said, strict=True)]
    return answers, sum(right) / count


@pytest.mark.parametrize("name", RUNS)
def test_answers_are_those_of_compare(name: str, count: int, runs: Callable[[str, int], Found]) -> None:
    own, (answers, right) = runs(name, 1), expected(name, count)
    assert own.said == answers.said
    assert own.score == pytest.approx(right)
    told = own.told
    assert told["avg_visual_tokens_per_layer"] == pytest.approx(answers.average_visual_tokens)
    assert told["avg_visual_tokens_at_entry"] == pytest.approx(answers.entry_visual_tokens)
    assert told["avg_prompts_of_all_ranks"] == count
    if name == "dense":
        assert told["avg_prefill_multiply_adds"] == told["avg_prefill_multiply_adds_dense"]
    else:
        assert told["avg_prefill_multiply_adds"] < told["avg_prefill_multiply_adds_dense"]
        assert told["avg_kv_bytes"] < told["avg_kv_bytes_dense"]


@pytest.mark.parametrize("name", BY_TWO)
def test_two_processes_equal_one(name: str, runs: Callable[[str, int], Found]) -> None:
    one, two = runs(name, 1), runs(name, 2)
    assert (one.said, one.score) == (two.said, two.score)
    counted = [key for key in one.told if key not in ("total_elapsed_time", "avg_speed")]
    assert "avg_visual_tokens_per_layer" in counted
    assert {key: two.told[key] for key in counted} == pytest.approx({key: one.told[key] for key in counted})


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_task(folder, 3)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrained=dense,policy=hidrop-65", "error: hidrop-65: no such policy; did you mean 'hidrop-64'"),
        ("pretrained=dense", "error: model_args: no policy is given, and dense records none"),
        ("pretrained=dense,policy=none,device=cpu", "error: model_args: device: lmms-eval gives it already"),
    ],
)
def test_errors_fail_the_run(arguments: str, message: str, task: Path, tmp_path: Path) -> None:
    words = ["--model", "dropflow", "--tasks", TASK, "--include_path", str(task), "--device", "cpu"]
    printed = evaluate(tmp_path, *words, "--model_args", arguments, code=1)
    assert any(line.startswith("error: ") for line in printed.splitlines())
    assert not list(tmp_path.rglob("*_results.json"))
    assert re.search(message, printed), printed[-3000:]


def test_an_error_in_one_of_two_processes_fails_the_run(tmp_path: Path) -> None:
    copied = tmp_path / "task"
    write_task(copied, 4)
    (copied / "images" / "00001.png").write_bytes(b"no picture")  # of the second process
    words = ["--model", "dropflow", "--tasks", TASK, "--include_path", str(copied), "--device", "cpu"]
    printed = evaluate(tmp_path, *words, "--model_args", "pretrained=hidrop", ranks=2, code=1)
    assert "cannot identify image file" in printed
    assert not list(tmp_path.rglob("*_results.json"))


ROUNDS = """
from PIL import Image


def asked(doc, lmms_eval_specific_kwargs=None, round_idx=None, previous_output=None, previous_round_info=None):
    if round_idx is None:
        return "what digit is yellow ?"
    ended = round_idx == doc["rounds"]
    return pictures(doc), "how many digits are there ?", ended, previous_output, None


def pictures(doc):
    return [Image.open(doc["picture"]).convert("RGB")] * doc["shown"]


def score(doc, results):
    said = results[0]
    return {"exact_match": float(len(said) == doc["rounds"] and all(isinstance(one, str) for one in said))}
"""


def test_rounds_and_several_pictures(task: Path, tmp_path: Path) -> None:
    picture = str(task / "images" / "00000.png")
    documents = [{"picture": picture, "rounds": rounds, "shown": shown} for rounds, shown in ((1, 1), (3, 2), (2, 1))]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    (tmp_path / "rounds.py").write_text(ROUNDS)
    whole = yaml.safe_dump({"test": str(tmp_path / "data.jsonl")}, default_flow_style=True).strip()
    (tmp_path / "rounds.yaml").write_text(
        f"task: rounds\ndataset_path: json\ndataset_kwargs:\n  data_files: {whole}\ntest_split: test\n"
        "output_type: generate_until_multi_round\ndoc_to_text: !function rounds.asked\n"
        "doc_to_visual: !function rounds.pictures\ndoc_to_target: rounds\nprocess_results: !function rounds.score\n"
        "generation_kwargs: {max_new_tokens: 4}\n"
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )
    words = ["--model", "dropflow", "--model_args", "pretrained=hidrop", "--tasks", "rounds", "--device", "cpu"]
    evaluate(tmp_path, *words, "--include_path", str(tmp_path), "--batch_size", "2", "--log_samples")
    (results,) = (tmp_path / "out").rglob("*_results.json")
    result = json.loads(results.read_text())
    assert result["results"]["rounds"]["exact_match,none"] == 1
    told = result["throughput"]
    assert told["avg_prompts_of_all_ranks"] == 6  # 1 + 3 + 2 rounds
    assert told["avg_visual_tokens_at_entry"] == 144 * (1 + 3 * 2 + 2) / 6
