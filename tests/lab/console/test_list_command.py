"""`dropflow list`."""

from __future__ import annotations

import json

import pytest

from dropflow.errors import BrokenPlugin
from dropflow.policy import registry

GROUPS = {"stages": registry.STAGES, "adapters": registry.ADAPTERS}


@pytest.mark.parametrize("kind", GROUPS)
def test_every_registered_name_is_listed_with_a_line_about_it(cli, kind) -> None:
    rows = json.loads(cli("list", kind, "--json").stdout)[kind]
    assert [row["name"] for row in rows] == registry.names(GROUPS[kind])
    assert all(row["summary"] for row in rows)


def test_stages_are_listed_with_their_options(cli) -> None:
    rows = {row["name"]: row for row in json.loads(cli("list", "stages", "--json").stdout)["stages"]}
    learned = {"learn", "final_temperature", "budget_weight"}
    options = {"keep", "budget", "split", "select", "temperature"} | learned
    assert set(rows["hidrop/concave-pyramid"]["options"]) == options
    assert rows["hidrop/early-exit"]["paper"].startswith("arXiv:2602.23699")


def test_policies_are_listed_with_what_they_are_tuned_for(cli) -> None:
    rows = {row["name"]: row for row in json.loads(cli("list", "policies", "--json").stdout)["policies"]}
    assert list(rows) == list(registry.policy_files())
    assert rows["hidrop-64"]["tuned_for"] == {"layers": 32, "visual_tokens": 576}


@pytest.mark.parametrize("kind", ["stages", "policies", "adapters"])
def test_tables_show_whole_names(cli, kind) -> None:
    names = list(registry.policy_files()) if kind == "policies" else registry.names(GROUPS[kind])
    shown = cli("list", kind).stdout.splitlines()
    assert [line.split()[0] for line in shown] == names


def test_a_terminal_of_80_columns_has_one_line_a_name(cli, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    shown = cli("list", "stages").stdout.splitlines()
    assert [line.split()[0] for line in shown] == registry.names(registry.STAGES)
    assert max(map(len, shown)) <= 80
    assert "fastv/attention-rank           after the first layers, the tokens that the …" in shown


def test_one_name_is_shown_with_all_that_is_known_of_it(cli, refused) -> None:
    lines = cli("list", "stages", "hidrop/early-exit").stdout.splitlines()
    assert lines[:3] == [
        "name: hidrop/early-exit",
        "summary: every visual token is gone from a boundary on",
        "paper: arXiv:2602.23699, section 3.3",
    ]
    at = lines.index("options:")
    assert lines[at + 1].startswith("  at: first boundary without vision")
    assert "training free: no" in lines
    assert "did you mean 'divprune-56'" in refused("list", "policies", "divprune")


def test_a_broken_package_hides_no_other(cli, monkeypatch) -> None:
    load = registry.load

    def load_or_break(group: str, name: str) -> object:
        if name == "hidrop/early-exit":
            raise BrokenPlugin("hidrop/early-exit cannot be imported")
        return load(group, name)

    monkeypatch.setattr(registry, "load", load_or_break)
    rows = {row["name"]: row for row in json.loads(cli("list", "stages", "--json").stdout)["stages"]}
    assert rows["hidrop/early-exit"]["error"] == "hidrop/early-exit cannot be imported"
    assert "summary" in rows["hidrop/late-injection"]
    assert "cannot be imported" in " ".join(cli("list", "stages").stdout.split())


def test_the_table_in_a_document_is_renewed_between_its_marks(cli, refused, tmp_path) -> None:
    document = tmp_path / "methods.md"
    document.write_text("before\n<!-- table of stages -->\nfrom-before\n<!-- end of table of stages -->\nafter\n")
    assert cli("list", "stages", "--into", document).exit_code == 0
    text = document.read_text()
    assert text.startswith("before\n<!-- table of stages -->\n\n| stage |")
    assert text.endswith("<!-- end of table of stages -->\nafter\n")
    assert "from-before" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| `hidrop/early-exit` |")]
    assert [cell.strip() for cell in row.split("|")[3:8]] == [
        "`exit`",
        "",
        "all or none, by layer",
        "no",
        "`at`, `keep_last`",
    ]
    (row,) = [line for line in text.splitlines() if line.startswith("| `mustdrop/spatial-merge` |")]
    assert [cell.strip() for cell in row.split("|")[3:7]] == ["`encode`", "`grid`", "by the data", "yes"]
    document.write_text("no marks")
    assert f"{document}: expected the lines" in refused("list", "stages", "--into", document)
    assert "only stages and models" in refused("list", "policies", "--into", document)


def test_model_types_are_listed_with_their_adapter_or_the_reason(cli, monkeypatch) -> None:
    monkeypatch.setattr("dropflow_lab.backbones.listing.kinds", lambda: ["git", "llava", "qwen3_vl"])
    rows = {row["name"]: row for row in json.loads(cli("list", "models", "--json").stdout)["models"]}
    assert rows["llava"]["adapter"] == "llava"
    assert {"cls", "grid", "vision_layers"} <= set(rows["llava"]["facts"])
    assert rows["qwen3_vl"]["limits"] == {}
    assert rows["git"]["status"] == "refused"
    assert rows["git"]["reason"].startswith("its core has no `get_image_features`")
    shown = cli("list", "models").stdout.splitlines()
    assert shown[0].startswith("git       refused: its core has no")
    assert shown[2].startswith("qwen3_vl  served by qwen3_vl: final_norm, grid, rotary")
    assert "class: LlavaForConditionalGeneration" in cli("list", "models", "llava").stdout


def test_the_table_of_models_in_a_document_is_renewed(cli, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("dropflow_lab.backbones.listing.kinds", lambda: ["git", "llava"])
    document = tmp_path / "backbones.md"
    document.write_text("<!-- table of models -->\n<!-- end of table of models -->\n")
    assert cli("list", "models", "--into", document).exit_code == 0
    text = document.read_text()
    assert ": 1 are served." in text
    assert "| `llava` | `LlavaForConditionalGeneration` | `llava` | `cls`, " in text
    assert "| `git` | `GitForCausalLM` | refused | its core has no" in text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "missing argument 'kind'. choose from: stages, policies, adapters, models"),
        (("stage",), "invalid value for 'kind': 'stage' is not one of 'stages', 'policies', 'adapters', 'models'"),
    ],
)
def test_a_wrong_kind_is_refused_in_one_line(refused, words, line) -> None:
    assert line in refused("list", *words).lower()
