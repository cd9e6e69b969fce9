"""`dropflow profile`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dropflow_lab.digits.checkpoints.model import sample_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with two pictures and a question about each."""
    (tmp_path / "images").mkdir()
    sample_image().save(tmp_path / "images" / "scene.png")
    Image.new("RGB", (60, 40), "blue").save(tmp_path / "images" / "blue.png")
    lines = [
        {"image": "scene.png", "question": "is there a 7 ?"},
        {"image": "blue.png", "question": "how many digits ?"},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.fixture
def profiled(cli: Any, model_folder: Path, folder: Path, tmp_path: Path) -> Any:
    """Profile the untrained four-layer model on two pictures; return what stdout says and the output folder."""
    arguments = ("profile", model_folder, "--data", folder, "--out", tmp_path / "out", "--max-new-tokens", 2)

    def call(*more: object) -> tuple[str, Path]:
        result = cli(*arguments, *more)
        assert result.exit_code == 0, result.stderr
        return result.stdout, tmp_path / "out"

    return call


def test_numbers_figure_and_a_policy_that_check_accepts(profiled, cli) -> None:
    shown, out = profiled("--json", "--exit", 4, "--entry", 1, "--fewer", 0.5)
    told = json.loads(shown)
    assert told == json.loads((out / "profile.json").read_text())
    assert (told["schema"], told["layers"], told["visual_tokens"], told["samples"]) == ("dropflow-profile/1", 4, 144, 2)
    assert {name: len(curve) for name, curve in told["curves"]["intra"].items()} == {
        "system": 3,
        "visual": 3,
        "instruction": 3,
    }
    assert {int(n): len(curve) for n, curve in told["curves"]["ilvas"].items()} == {1: 3}
    assert (len(told["exits"]), len(told["entries"])) == (4, 4)
    assert told["dense"] == {"accuracy": None, "agreement": 1.0, "kl": 0.0} == told["entries"][0]
    choice = told["choice"]
    assert (choice["entry"], choice["exit"], list(choice["keep"])) == (1, 4, ["2"])
    assert choice["average_visual_tokens"] == 72  # layer 1 whole, 72 tokens in layers 2 and 3
    checked = json.loads(cli("check", out / "policy.yaml", "--json").stdout)
    assert checked["valid"]
    assert checked["resolved_for"] == {"layers": 4, "visual_tokens": 144}
    assert list(checked["stages"]) == ["inject", "pyramid"]  # an exit at the end would do nothing
    assert (out / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "profile.svg").read_text().startswith("<?xml")


def test_finished_pieces_are_read_and_give_the_same_profile(profiled, monkeypatch) -> None:
    arguments = ("--json", "--exit", 4, "--entry", 1, "--fewer", 0.5)
    shown, out = profiled(*arguments)
    pieces = sorted(path.name.rpartition("-")[0] for path in (out / "finished").iterdir())
    assert pieces == ["entries-0", "exits-0", "layers-0"]
    next((out / "finished").glob("exits-0-*")).unlink()  # as if another process had been killed over it
    monkeypatch.setattr("dropflow_lab.profile.pieces.Pieces._layers", lambda *_: pytest.fail("measured again"))
    assert profiled(*arguments)[0] == shown


def test_the_table_for_people(profiled) -> None:
    shown, _ = profiled("--exit", 4, "--entry", 1, "--fewer", 0.5)
    words = " ".join(shown.split())
    assert "2 questions; agreement without a policy 100.0%" in words
    assert "enter at 1, prune at 2, no exit: 72.00 visual tokens per layer on average (50.0% fewer)" in words


def test_what_is_missing_is_said_before_any_work(refused, monkeypatch, tmp_path, model_folder) -> None:
    monkeypatch.setattr("dropflow_lab.console.commands.profile.find_spec", lambda _: None)
    monkeypatch.setattr("dropflow_lab.inputs.models.load_model", lambda _: pytest.fail("a model was loaded"))
    assert "pip install 'dropflow[figures]'" in refused("profile", model_folder, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_budget_that_cannot_be_met_leaves_what_was_measured_alone(refused, model_folder, folder, tmp_path) -> None:
    out = tmp_path / "out"
    arguments = ("profile", model_folder, "--data", folder, "--out", out, "--max-new-tokens", 1, "--exit", 4)
    assert "an average of 1 tokens cannot be met" in refused(*arguments, "--average-tokens", 1)
    assert [path.name for path in out.iterdir()] == ["finished"]


def test_bad_arguments(refused, model_folder, folder, tmp_path) -> None:
    known = ("profile", model_folder, "--data", folder)
    assert "--entry: expected a boundary from 0 to 3" in refused(*known, "--out", tmp_path / "out", "--entry", 4)
    assert "data.jsonl is not a writable folder" in refused(*known, "--out", folder / "data.jsonl")
    assert "data.jsonl:1: image: no file" in refused("profile", "--data", _broken(tmp_path), "--out", tmp_path / "out")


def _broken(folder: Path) -> Path:
    (folder / "broken").mkdir()
    (folder / "broken" / "data.jsonl").write_text('{"image": "gone.png", "question": "what ?"}\n')
    return folder / "broken"
