"""Comparing policies: the same questions, controls at equal tokens, finished measurements read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dropflow_lab.compare import compare as comparing
from dropflow_lab.compare.answers import Answers
from dropflow_lab.compare.compare import Comparing, Rules, fitting, smaller
from dropflow_lab.compare.rows import make_row
from dropflow_lab.compare.store import Finished
from dropflow_lab.inputs.data import Sample, read_samples
from dropflow_lab.inputs.models import load_model

HALF = {"name": "half", "stages": {"keep": {"use": "control/random", "keep": {2: 40}, "seed": 7}}}
RULES = Rules(batch=4, max_new_tokens=2, control_seeds=2, timed=1, rounds=0)


@pytest.fixture(scope="module")
def subject(model_folder: Path) -> tuple[Any, Any]:
    return load_model(model_folder)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return read_samples("digits", 6)


def test_rows_stand_beside_random_pruning_at_their_own_average(
    subject: tuple[Any, Any], samples: list[Sample], tmp_path: Path
) -> None:
    fit, _ = fitting(subject[0], [HALF])
    dense, half = Comparing(*subject, samples, Finished(tmp_path), RULES).rows(fit)
    assert (dense.average_visual_tokens, dense.entry_visual_tokens, dense.control) == (144, 144, None)
    assert (half.average_visual_tokens, half.entry_visual_tokens) == (92, 144)  # 144, 144, 40, 40
    assert half.control is not None
    assert (half.control.average_visual_tokens, half.control.seeds) == (92, 2)
    assert half.cost is not None
    assert half.cost.work.flops_formula < half.cost.dense.flops_formula
    assert dense.agreement.value == 1
    names = sorted(path.name.rpartition("-")[0] for path in tmp_path.iterdir())
    assert names == [
        "answers-dense",
        "answers-half",
        "answers-random-92-seed-0",
        "answers-random-92-seed-1",
        "cost-dense",
        "cost-half",
    ]


def test_finished_measurements_are_not_run_again(
    subject: tuple[Any, Any], samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, _ = fitting(subject[0], [HALF])
    stopped = Comparing(*subject, samples, Finished(tmp_path), RULES).rows(fit)
    first = next(stopped)
    stopped.close()  # as when the run is killed here
    asked: list[str] = []
    real = comparing.ask

    def counted(model: Any, processor: Any, policy: Any, *rest: Any, **options: Any) -> Answers:
        asked.append("dense" if policy is None else policy.name)
        return real(model, processor, policy, *rest, **options)

    monkeypatch.setattr(comparing, "ask", counted)
    rows = list(Comparing(*subject, samples, Finished(tmp_path), RULES).rows(fit))
    assert asked == ["half", "random-92-seed-0", "random-92-seed-1"]
    assert rows[0] == first
    assert list(Comparing(*subject, samples, Finished(tmp_path), RULES).rows(fit)) == rows
    assert len(asked) == 3
    list(Comparing(*subject, samples[:5], Finished(tmp_path), RULES).rows(fit))
    assert len(asked) == 7  # other questions are other measurements


def test_downsampled_pictures_are_other_questions_on_the_same_model(
    subject: tuple[Any, Any], samples: list[Sample], tmp_path: Path
) -> None:
    few = smaller(samples, 36, 8)
    assert few[0].images()[0].size == (48, 48)  # 6 x 6 cells of 8 pixels
    assert [sample.question for sample in few] == [sample.question for sample in samples]
    rules = replace(RULES, downsample=(36, 144), timed=0)
    dense, at_36, at_144 = Comparing(*subject, samples, Finished(tmp_path), rules).rows([])
    assert [row.policy for row in (dense, at_36, at_144)] == ["dense", "downsample-36", "downsample-144"]
    assert at_36.average_visual_tokens == 144  # CLIP enlarges the picture again: what is lost, not what is saved
    assert at_144.agreement.value == 1  # as many cells as the picture has


def test_policies_that_do_not_fit_say_why(subject: tuple[Any, Any]) -> None:
    fit, refused = fitting(subject[0], [HALF, "hidrop-64", "no-such-policy"])
    assert [policy.name for policy in fit] == ["half"]
    assert "rescale" in refused["hidrop-64"]
    assert "no such policy" in refused["no-such-policy"]


def test_gain_is_paired_and_agreement_stands_in_for_unknown_answers() -> None:
    def sample(answer: str | None) -> Sample:
        return Sample((), "?", answer, "kind")

    def said(*answers: str) -> Answers:
        return Answers(answers, 10.0, 20.0)

    known = [sample("a"), sample("b"), sample("c"), sample(None)]
    dense, own = said("a", "b", "x", "y"), said("A.", "b", "c", "y")
    controls = [said("a", "x", "x", "y"), said("x", "b", "x", "z")]
    row = make_row("p", known, own, dense, controls)
    assert row.accuracy is not None
    assert row.control is not None
    assert row.control.accuracy is not None
    assert row.accuracy.value == 1  # case and a full stop do not count; the unknown one is left out
    assert row.agreement.value == 2 / 4  # word for word: `A.` is not `a`
    assert row.control.accuracy.value == pytest.approx(1 / 3)
    assert row.control.gain.value == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert row.kinds["kind"].value == 1
    unknown = make_row("p", [sample(None)] * 4, own, dense, controls)
    assert unknown.accuracy is None
    assert unknown.control is not None
    assert unknown.control.gain.value == pytest.approx(2 / 4 - (3 / 4 + 2 / 4) / 2)


def test_a_folder_of_questions_by_the_command(cli: Any, refused: Any, model_folder: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "images").mkdir(parents=True)
    lines = []
    for number, sample in enumerate(read_samples("digits", 3)):
        sample.images()[0].save(data / "images" / f"{number}.png")
        lines.append(json.dumps({"image": f"images/{number}.png", "question": sample.question}))
    (data / "data.jsonl").write_text("\n".join(lines))
    policy = tmp_path / "half.yaml"
    policy.write_text(yaml.safe_dump(HALF))
    options = ["--data", data, "--out", out, "--timed", 1, "--rounds", 2, "--max-new-tokens", 2]
    result = cli("compare", model_folder, "--policies", policy, *options, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["policy"] for row in rows] == ["dense", "half"]
    assert [row["accuracy"] for row in rows] == [None, None]
    assert rows[1]["cost"]["times"]["total"]["median"] > 0
    assert json.loads((out / "compare.json").read_text())["rows"] == rows
    assert {path.name for path in out.iterdir()} == {"compare.json", "compare.png", "compare.svg", "finished"}
    shown = cli("compare", model_folder, "--policies", policy, *options)
    assert "agreement" in shown.stdout
    assert "half" in shown.stdout
    assert "--policies: nope: " in refused("compare", model_folder, "--policies", "nope", *options)
    assert "names or paths with commas" in refused("compare", model_folder, "--policies", "", *options)
    assert "--downsample" in refused("compare", model_folder, "--downsample", "few", *options)
    document = tmp_path / "results.md"
    document.write_text("# Results\n<!-- comparison -->\n<!-- end of comparison -->\n")
    assert cli("compare", model_folder, "--policies", policy, *options, "--into", document).exit_code == 0
    shown = [line for line in document.read_text().splitlines() if line.startswith("| `")]
    assert [line.split("|")[1].strip() for line in shown] == ["`dense`", "`half`"]
