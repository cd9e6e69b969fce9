"""`dropflow tune`, and what it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import dropflow
from dropflow_lab.inputs.data import read_samples

pytest.importorskip("optuna")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with six questions about as many pictures, of which the last repeats the first one's."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    lines = []
    for number, sample in enumerate(read_samples("digits", 7)):
        name = f"images/{number % 6}.png"
        if number < 6:
            sample.images()[0].save(folder / name)
        lines.append(json.dumps({"image": name, "question": sample.question, "kind": "odd" if number == 1 else "even"}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


def test_a_search_writes_the_front_a_figure_and_policies_that_check_accepts(
    cli: Any, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--data", data, "--out", out, "--budget", "average_tokens=30,72", "--questions", 3, "--held-out", 4]
    options += ["--methods", "divprune/max-min,control/stride", "--start", "divprune-56,vtw-16", "--trials", 2]
    options += ["--profiled", 2, "--timed", 1, "--rivals", 2, "--max-new-tokens", 2, "--apart", "odd"]
    result = cli("tune", model_folder, *options, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told == json.loads((out / "tune.json").read_text())
    small, large = told["budgets"]
    assert (small["budget"], large["budget"]) == ({"average_tokens": 30}, {"average_tokens": 72})
    assert list(small["refused"]) == ["vtw-16"]  # it has every token in half of the layers
    assert {len(trial["policy"]["stages"]) > 0 for trial in small["trials"]} == {True}
    assert [trial["questions"] for trial in small["trials"]] == [2] * len(small["trials"])  # one kind is left out
    for budget in told["budgets"]:
        held_out = budget["held_out"]
        assert held_out["score"]["asked"] == 3  # the seventh asks about a picture that was tuned on
        assert held_out["dense"]["value"] == 1  # agreement with itself: no answers are known
        assert all(one["gain"]["verdict"] in ("above", "level", "below") for one in held_out["against"])
        assert budget["best"]["kl"] == min(one["kl"] for one in budget["trials"] if not one["stopped"])
    costs = [point["average_tokens"] for point in told["front"]]
    assert costs == sorted(costs)
    assert [point["kl"] for point in told["front"]] == sorted((point["kl"] for point in told["front"]), reverse=True)
    assert told["front"][0]["measured"]["work"]["kv_bytes"] < told["front"][0]["measured"]["dense"]["kv_bytes"]
    assert (out / "tune.png").read_bytes().startswith(b"\x89PNG")
    for name, average in (("tuned-average-tokens-30", 30), ("tuned-average-tokens-72", 72)):
        text = (out / f"{name}.yaml").read_text()
        assert text.startswith("# Found by `dropflow tune` for ")
        assert "On 3 other questions: " in text
        assert yaml.safe_load(text)["tuned_for"] == {"layers": 4, "visual_tokens": 144}
        explained = json.loads(cli("explain", out / f"{name}.yaml", "--json").stdout)
        assert 0.8 * average <= explained["average_visual_tokens"] <= average
        assert dropflow.load_policy(out / f"{name}.yaml").name == name
    names = {path.name for path in (out / "finished").iterdir()}
    shown = cli("tune", model_folder, *options)
    assert "Pareto front" in shown.stdout
    assert "without a policy" in shown.stdout
    assert {path.name for path in (out / "finished").iterdir()} == names  # nothing is done again


def test_bad_input_is_refused_before_any_work(
    refused: Any, model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = ("tune", model_folder, "--data", data, "--out", tmp_path / "out")
    for budget in ("tokens=3", "kv=2", "average_tokens=", "average_tokens=few", "14"):
        assert "--budget: expected average_tokens=N, flops=SHARE or kv=SHARE" in refused(*known, "--budget", budget)
    small = (*known, "--budget", "kv=0.2")
    assert "no stage named 'divprun'" in refused(*small, "--methods", "divprun")
    assert "expected at least 2 questions to tune on and 2 others" in refused(*small, "--questions", 7)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "tuning needs Optuna: pip install 'dropflow[tune]'" in refused(*small)
    assert not (tmp_path / "out").exists()
