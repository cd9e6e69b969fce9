"""`dropflow trace`."""

from __future__ import annotations

import json

import jsonschema
import pytest
from PIL import Image

from dropflow_lab.trace import Trace


@pytest.fixture(scope="module")
def traced(tmp_path_factory, model_folder):
    """A trace of `model_folder` under a policy that prunes at boundary 2, and the arguments that name the model."""
    from typer.testing import CliRunner

    from dropflow_lab.console.cli import app

    folder = tmp_path_factory.mktemp("traced")
    (folder / "mild.yaml").write_text("stages: {pyramid: {use: hidrop/concave-pyramid, keep: {2: 40}}}")
    model = ("--model", str(model_folder))
    arguments = ("trace", *model, "--policy", str(folder / "mild.yaml"), "--max-new-tokens", "2")
    result = CliRunner().invoke(app, [*arguments, "-o", str(folder / "one.html"), "--json"])
    assert result.exit_code == 0, result.stderr
    return folder, model, json.loads(result.stdout)


def test_a_page_and_a_trace_are_written(traced, cli) -> None:
    folder, _, told = traced
    assert told["page"] == str(folder / "one.html")
    (run,) = told["runs"]
    assert (run["policy"], run["visual_tokens"]) == ("mild", [144, 144, 40, 40])
    trace = Trace.load(folder / "one.json")
    assert [layer.kv_entries for layer in trace.runs[0].layers] == run["kv_entries"]
    assert trace.prompt.question == "what digit is yellow ?"
    schema = json.loads(cli("schema", "--trace").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads((folder / "one.json").read_text()), schema)
    assert '"name":"mild"' in (folder / "one.html").read_text()


def test_two_policies_side_by_side_for_people(traced, cli, mild) -> None:
    folder, model, _ = traced
    arguments = ("--policy", folder / "mild.yaml", "--policy", mild, "--max-new-tokens", 1, "-o", folder / "two.html")
    result = cli("trace", *model, *arguments)
    assert result.exit_code == 0, result.stderr
    assert "92.00" in result.stdout  # (144 + 144 + 40 + 40) / 4 on average
    assert "wrote" in result.stdout
    assert [run.name for run in Trace.load(folder / "two.json").runs] == ["mild", "mild"]


def test_replay_alone_and_edited(traced, cli) -> None:
    folder, model, told = traced
    said = json.loads(
        cli("trace", *model, "--replay", folder / "one.json", "-o", folder / "again.html", "--json").stdout
    )
    (run,) = said["runs"]
    assert run == told["runs"][0] | {"policy": "mild (replay)"}
    trace = Trace.load(folder / "one.json")
    kept = trace.runs[0].boundaries[0].kept[0]
    gone = [patch for patch in range(144) if patch not in kept][:2]
    edits = ("--keep", f"0/{gone[0]},{gone[1]}", "--drop", f"{kept[0]}@3")
    result = cli("trace", *model, "--replay", folder / "one.json", *edits, "-o", folder / "edited.html", "--json")
    assert result.exit_code == 0, result.stderr
    counts = [own["visual_tokens"] for own in json.loads(result.stdout)["runs"]]
    assert counts == [[144, 144, 40, 40], [144, 144, 42, 41]]


def test_bad_input_is_one_line(traced, refused, tmp_path) -> None:
    folder, model, _ = traced
    replay = ("trace", *model, "--replay", folder / "one.json")
    Image.new("RGB", (96, 96)).save(tmp_path / "other.png")
    assert "made from other pictures" in refused("trace", tmp_path / "other.png", *replay[1:])
    assert "expected a name that ends in .html" in refused("trace", "-o", tmp_path / "page.txt")
    for command in (("trace", "-o", tmp_path / "other.png" / "x.html"), ("profile", "--out", tmp_path / "other.png")):
        assert "other.png is not a writable folder" in refused(*command)
    assert "--replay FILE" in refused("trace", "--keep", "3")
    assert "--policy, --set: cannot be combined with --replay" in refused(*replay, "--policy", "hidrop-64")
    assert "expected patches such as 17,18" in refused(*replay, "--keep", "first")
    assert "patches 0 to 143" in refused(*replay, "--keep", "144")
    assert "no such trace file" in refused("trace", "--replay", tmp_path / "none.json")
    page = refused("trace", "--replay", folder / "one.html")
    assert page.endswith("give the .json that `dropflow trace` writes next to the page")
    assert "image 1: the trace has image 0 alone" in refused(*replay, "--drop", "1/17")
    kept = Trace.load(folder / "one.json").runs[0].boundaries[0].kept[0]
    gone = next(patch for patch in range(144) if patch not in kept)
    assert f"patch {gone}: gone from boundary 3 on in the traced run" in refused(*replay, "--drop", f"{gone}@3")
    assert "--policy: missing" in refused("trace", *model)
    # the embedded model has twelve layers
    assert "a model of 4 layers" in refused("trace", "--replay", folder / "one.json", "-o", tmp_path / "x.html")
