"""Comparing policies: the same questions, controls at equal tokens, finished measurements read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import dropflow
from dropflow_lab.compare import compare as comparing
from dropflow_lab.compare.answers import Answers
from dropflow_lab.compare.compare import Rules, compare, smaller
from dropflow_lab.compare.lineup import Entry
from dropflow_lab.compare.rows import Member, Row, Title, make_row
from dropflow_lab.inputs.data import Sample, read_samples
from dropflow_lab.inputs.models import load_model
from dropflow_lab.measure.intervals import wilson
from dropflow_lab.store.finished import Finished

HALF = {"name": "half", "stages": {"keep": {"use": "control/random", "keep": {2: 40}, "seed": 7}}}
RULES = Rules(batch=4, max_new_tokens=2, control_seeds=2, timed=1, rounds=0)


@pytest.fixture(scope="module")
def subject(model_folder: Path) -> tuple[Any, Any]:
    return load_model(model_folder)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return read_samples("digits", 6)


def rows_of(
    subject: tuple[Any, Any], samples: list[Sample], out: Path, *policies: Any, rules: Rules = RULES
) -> Iterator[Row]:
    loaded = [dropflow.load_policy(policy) for policy in policies]
    entries = [Entry(Title("dense"), (("", None),)), *(Entry(Title(one.name), (("", one),)) for one in loaded)]
    return compare(entries, {"": subject}, samples, Finished(out), rules)


def test_rows_stand_beside_random_pruning_at_their_own_average(
    subject: tuple[Any, Any], samples: list[Sample], tmp_path: Path
) -> None:
    dense, half = rows_of(subject, samples, tmp_path, HALF)
    assert (dense.average_visual_tokens, dense.entry_visual_tokens, dense.control) == (144, 144, None)
    assert (half.average_visual_tokens, half.entry_visual_tokens) == (92, 144)  # 144, 144, 40, 40
    assert half.average_visual_tokens_answer == 92
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


def test_where_no_token_is_saved_there_is_no_control_but_a_reason(
    subject: tuple[Any, Any], samples: list[Sample], tmp_path: Path
) -> None:
    whole = {"name": "whole", "stages": {"keep": {"use": "control/keep-all"}}}
    _, row = rows_of(subject, samples, tmp_path, whole, rules=replace(RULES, timed=0))
    assert (row.control, row.no_control) == (None, "as many visual tokens as without a policy")
    _, row = rows_of(subject, samples, tmp_path, HALF, rules=replace(RULES, timed=0, control_seeds=0))
    assert (row.control, row.no_control) == (None, "not asked for")


def test_the_control_has_the_average_over_the_answer(
    subject: tuple[Any, Any], samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a policy that drops nothing in the prefill and evicts while decoding."""
    real = comparing.ask

    def evicting(model: Any, processor: Any, policy: Any, *rest: Any, **options: Any) -> Answers:
        answers = real(model, processor, policy, *rest, **options)
        late = policy is not None and policy.name == "late"
        return replace(answers, average_visual_tokens_answer=60.0) if late else answers

    monkeypatch.setattr(comparing, "ask", evicting)
    late = {"name": "late", "stages": {"keep": {"use": "control/keep-all"}}}
    _, row = rows_of(subject, samples, tmp_path, late, rules=replace(RULES, timed=0))
    assert (row.average_visual_tokens, row.average_visual_tokens_answer) == (144, 60)
    assert row.control is not None
    assert row.control.average_visual_tokens == 60


def test_finished_measurements_are_not_run_again(
    subject: tuple[Any, Any], samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = rows_of(subject, samples, tmp_path, HALF)
    first = next(stopped)
    stopped.close()  # as when the run is killed here
    asked: list[str] = []
    real = comparing.ask

    def counted(model: Any, processor: Any, policy: Any, *rest: Any, **options: Any) -> Answers:
        asked.append("dense" if policy is None else policy.name)
        return real(model, processor, policy, *rest, **options)

    monkeypatch.setattr(comparing, "ask", counted)
    rows = list(rows_of(subject, samples, tmp_path, HALF))
    assert asked == ["half", "random-92-seed-0", "random-92-seed-1"]
    assert rows[0] == first
    assert list(rows_of(subject, samples, tmp_path, HALF)) == rows
    assert len(asked) == 3
    list(rows_of(subject, samples[:5], tmp_path, HALF))
    assert len(asked) == 7  # other questions are other measurements


def test_downsampled_pictures_are_other_questions_on_the_same_model(
    subject: tuple[Any, Any], samples: list[Sample], tmp_path: Path
) -> None:
    few = smaller(samples, 36, 8)
    assert few[0].images()[0].size == (48, 48)  # 6 x 6 cells of 8 pixels
    assert [sample.question for sample in few] == [sample.question for sample in samples]
    rules = replace(RULES, downsample=(36, 144), timed=0)
    dense, at_36, at_144 = rows_of(subject, samples, tmp_path, rules=rules)
    assert [row.title.policy for row in (dense, at_36, at_144)] == ["dense", "downsample-36", "downsample-144"]
    assert at_36.average_visual_tokens == 144  # CLIP enlarges the picture again: what is lost, not what is saved
    assert at_144.agreement.value == 1  # as many cells as the picture has


def test_gain_is_paired_and_agreement_stands_in_for_unknown_answers() -> None:
    def sample(answer: str | None) -> Sample:
        return Sample((), "?", answer, "kind")

    def said(*answers: str) -> Answers:
        return Answers(answers, 10.0, 10.0, 20.0)

    known = [sample("a"), sample("b"), sample("c"), sample(None)]
    dense, own = said("a", "b", "x", "y"), said("A.", "b", "c", "y")
    controls = (said("a", "x", "x", "y"), said("x", "b", "x", "z"))
    row = make_row(Title("p"), known, [Member(own, dense, controls)])
    assert row.accuracy is not None
    assert row.control is not None
    assert row.control.accuracy is not None
    assert row.accuracy.value == 1  # case and a full stop do not count; the unknown one is left out
    assert row.agreement.value == 2 / 4  # word for word: `A.` is not `a`
    assert row.control.accuracy.value == pytest.approx(1 / 3)
    assert row.control.gain.value == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert row.kinds["kind"].value == 1
    unknown = make_row(Title("p"), [sample(None)] * 4, [Member(own, dense, controls)])
    assert unknown.accuracy is None
    assert unknown.control is not None
    assert unknown.control.gain.value == pytest.approx(2 / 4 - (3 / 4 + 2 / 4) / 2)


def test_kinds_apart_count_in_neither_accuracy_nor_gain() -> None:
    samples = [Sample((), "?", "a", kind) for kind in ("pos", "pos", "count", "count")]

    def said(*answers: str) -> Answers:
        return Answers(answers, 10.0, 10.0, 20.0)

    member = Member(said("a", "x", "a", "a"), said("a", "a", "a", "a"), (said("x", "x", "a", "a"),))
    row = make_row(Title("p"), samples, [member], ["count"])
    assert row.accuracy is not None
    assert row.control is not None
    assert (row.accuracy.value, row.accuracy.asked) == (1 / 2, 2)
    assert (row.control.gain.value, row.agreement.value) == (1 / 2, 3 / 4)
    assert {kind: share.value for kind, share in row.kinds.items()} == {"pos": 1 / 2, "count": 1}
    assert row.to_json()["control"]["verdict"] == "level"


def test_a_row_of_seeds_is_their_mean() -> None:
    samples = [Sample((), "?", "a", kind) for kind in ("pos", "pos", "read", "sum")]
    dense = Answers(("a",) * 4, 144.0, 144.0, 144.0)
    answers = [Answers(said, 30.0 + seed, 30.0 + seed, 36.0) for seed, said in enumerate(("axax", "aaaa", "axxx"))]
    members = [Member(replace(one, said=tuple(one.said)), dense) for one in answers]
    row = make_row(Title("p-{seed}"), samples, members, ["read"])
    assert row.accuracy is not None
    assert row.by_seed == pytest.approx((1 / 3, 1, 1 / 3))
    assert row.accuracy.value == pytest.approx(5 / 9)
    assert (row.accuracy.low, row.accuracy.high) == pytest.approx(wilson(5 / 9, 3))
    assert row.kinds["read"].value == pytest.approx(2 / 3)
    assert (row.average_visual_tokens, row.entry_visual_tokens) == (31, 36)
    assert row.agreement.value == pytest.approx((2 + 4 + 1) / 12)


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
    assert [row["rescaled"] for row in rows] == [False, False]
    parts = rows[1]["cost"]["times"]["parts"]
    assert sum(value for name, value in parts.items() if name != "total") == pytest.approx(parts["total"])
    assert json.loads((out / "compare.json").read_text())["rows"] == rows
    assert {path.name for path in out.iterdir()} == {"compare.json", "compare.png", "compare.svg", "finished"}
    shown = cli("compare", model_folder, "--policies", policy, *options)
    assert "agreement" in shown.stdout
    assert "half" in shown.stdout
    assert "…" not in shown.stdout
    assert "--policies: nope: " in refused("compare", model_folder, "--policies", "nope", *options)
    assert "comma-separated names or paths" in refused("compare", model_folder, "--policies", "", *options)
    assert "--downsample" in refused("compare", model_folder, "--downsample", "few", *options)
    assert "--models" in refused("compare", model_folder, "--models", "dense,hidrop", *options)
    document = tmp_path / "results.md"
    document.write_text("no marks")
    assert "<!-- comparison -->" in refused("compare", model_folder, "--into", document, *options)
    document.write_text("# Results\n<!-- comparison -->\n<!-- end of comparison -->\n")
    assert cli("compare", model_folder, "--policies", policy, *options, "--into", document).exit_code == 0
    shown = [line for line in document.read_text().splitlines() if line.startswith("| `")]
    assert [line.split("|")[1].strip() for line in shown] == ["`half`", "`dense`", "`half`"]


@pytest.mark.parametrize(("keep", "name"), [(64, "64"), (1234, "1230"), (12_345, "12300"), (0.12345, "0.123")])
def test_random_pruning_has_a_plain_name_at_any_number_of_tokens(keep: float, name: str) -> None:
    assert comparing._random(keep, 2, "image").name == f"random-{name}-seed-2"
