"""The code in the documents runs, and the tutorials build the extension that the tests install."""

from __future__ import annotations

import importlib
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from documents import ROOT, blocks, files_of, install, passes_its_tests, run, without_blank_lines
from tiny import HIDROP, prompt, tiny_llava
from training import Prompts, collate, freeze_tower
from typer.testing import CliRunner

import dropflow
import dropflow.testing
from dropflow.policy.plan import resolve
from dropflow.units import BackboneShape
from dropflow_lab.console.cli import app
from dropflow_lab.explain.listing import stages_in_markdown
from dropflow_lab.markdown import around, renew

TUTORIALS = ["write-a-stage", "write-an-adapter", "write-a-policy"]


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_runs_from_top_to_bottom(name: str, extension: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(extension / "dropflow_example")
    assert run(f"docs/{name}.md", lambda *words: CliRunner().invoke(app, list(words))) >= 4


@pytest.mark.timeout(900)
def test_the_plug_in_made_from_a_paper_is_installed_runs_and_passes_its_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, page = tmp_path / "package", "docs/from-a-paper-to-a-plug-in.md"
    for name, text in files_of(page).items():
        file = package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    folder = install(package, tmp_path / "site")
    passes_its_tests(package, folder, tmp_path / "told.txt")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(package)
    try:
        assert run(page, lambda *words: CliRunner().invoke(app, list(words))) >= 8
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "dropflow_fastervlm"]:
            del sys.modules[name]


def test_the_example_of_the_readme_prints_what_it_says() -> None:
    assert run("README.md", lambda *words: CliRunner().invoke(app, list(words))) >= 2


def test_the_example_of_the_page_on_overlap_prints_what_it_says() -> None:
    assert run("docs/overlap.md", lambda *words: CliRunner().invoke(app, list(words))) >= 1


def test_the_examples_of_the_page_on_the_cache_print_what_they_say() -> None:
    assert run("docs/cache.md", lambda *words: CliRunner().invoke(app, list(words))) >= 4


def test_a_block_that_prints_something_else_than_the_document_says_is_found(tmp_path: Path) -> None:
    document = tmp_path / "wrong.md"
    fence = "`" * 3
    document.write_text(f'{fence}python\nprint(1 + 1)\n{fence}\n{fence}text title="output"\n3\n{fence}\n')
    with pytest.raises(AssertionError, match=r"wrong\.md:4: it printed\n2"):
        run(str(document), CliRunner().invoke)


def test_the_stage_of_the_page_on_soft_selection_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "softly.py"
    file.write_text(blocks("docs/soft-selection.md", "python")[0].text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    ranked = importlib.import_module("softly").Ranked
    model = tiny_llava().train()
    ranking = model.get_decoder().layers[2].self_attn
    torch.nn.init.zeros_(ranking.o_proj.weight)
    inputs = prompt([(3, "I", 5)])
    with dropflow.attach(model, {"name": "soft", "stages": {"s": {"use": ranked}}}) as flow:
        model(**inputs, labels=inputs["input_ids"].where(torch.arange(25) > 22, -100)).loss.backward()
        visual = [layer.visual_tokens for layer in flow.report().layers]
    assert visual == [16, 16, 8, 8, 8, 8]
    assert ranking.q_proj.weight.grad.abs().max() > 1e-5


@torch.no_grad()
def test_the_stage_of_the_page_on_hooks_leaves_blank_units_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [one for one in blocks("docs/stages.md", "python") if "WithoutBlank" in one.text]
    (tmp_path / "blank.py").write_text(block.text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    stage = importlib.import_module("blank").WithoutBlank
    tiny = dropflow.testing.tiny_models()["qwen2_5_vl"][1]
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 5)])
    inputs["pixel_values"][4:12] = 0.5  # the second and third unit
    with dropflow.attach(model, {"name": "blank", "stages": {"s": {"use": stage}}}) as flow:
        model(**inputs)
        live = flow.live()[0, 0, inputs["input_ids"][0] == dropflow.testing.IMAGE]
        assert flow.report().tower_visual_tokens == 6
    assert live.int().tolist() == [1, 0, 0, 1, 1, 1, 1, 1]


def test_the_tutorials_build_the_extension() -> None:
    told: dict[str, str] = {}
    for name in TUTORIALS:
        told |= files_of(f"docs/{name}.md")
    extension = ROOT / "tests" / "extension"
    assert set(told) == {
        "pyproject.toml",
        "dropflow_example/top_p.py",
        "dropflow_example/deepseek_vl.py",
        "tests/tiny_deepseek_vl.py",
        "dropflow_example/example-top-p.yaml",
    }
    for file, text in told.items():
        expected = (extension / file).read_text(encoding="utf-8")
        assert without_blank_lines(text) == without_blank_lines(expected), f"{file}: the tutorial says something else"


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    if not (ROOT / "mkdocs.yml").exists():
        pytest.skip("the documents are not beside the tests")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "reference" / "index.html").read_text(encoding="utf-8")
    missing = [name for name in dropflow.__all__ if f'id="dropflow.{name}"' not in reference]
    for package in (dropflow.operators, dropflow.testing):
        missing += [name for name in package.__all__ if not re.search(rf'\.{name}"|<code>{name}</code>', reference)]
    assert not missing, f"docs/reference.md lacks {missing}"


def test_the_makefile_has_the_readmes_commands() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not beside the tests")
    text = readme.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    told = text + (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for command in ("demo", "test", "docs", "test-oldest", "test-newest"):
        assert f"make {command}" in told
        assert re.search(rf"^(?:[\w-]+ )*{command}(?: [\w-]+)*:", makefile, re.MULTILINE)


def test_tests_and_environments_are_named_by_paths_that_exist() -> None:
    """Titles of blocks name files of the package that a page builds, NAME stands for any."""
    given = [ROOT / "Makefile", ROOT / ".ci" / "run", *ROOT.glob("*.md"), *(ROOT / "environments").iterdir()]
    sources = [path for path in [*given, *(ROOT / "docs").rglob("*.md")] if path.is_file()]
    path = re.compile(r'(?<![\w/."-])(?:tests|environments|distributions)/[\w./-]*\w')
    named = {(source.name, found) for source in sources for found in path.findall(source.read_text(encoding="utf-8"))}
    assert len(named) > 20
    assert [one for one in sorted(named) if "NAME" not in one[1] and not (ROOT / one[1]).exists()] == []


def test_flags_are_added_to_those_of_a_target() -> None:
    told = subprocess.run(
        ["make", "--dry-run", "test-deepspeed", "FLAGS=-x"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert re.search(r'pytest .* tests/lab/finetune/test_processes\.py -x -m "slow or not slow"$', told.stdout, re.M)


def test_the_results_are_of_policies_that_fit_the_embedded_model() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    first, *named = re.findall(r"--policies (\S+)", makefile)[0].split(",")
    assert first == "all"
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for source in named:
        resolve(dropflow.load_policy(ROOT / source), BackboneShape(12, 144))
        assert f"`{source}`" in page
    around(ROOT / "docs" / "results.md", "comparison")  # where `make results` writes


def test_the_results_on_videos_are_of_policies_that_fit_the_model_for_clips() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = re.findall(r"[\w-]+-\d\d", re.findall(r"^CLIPS := .*?\)", makefile, re.DOTALL | re.MULTILINE)[0])
    sources = sorted((ROOT / "docs" / "results" / "clips").glob("*.yaml"))
    assert sorted(listed) == [source.stem for source in sources]
    page = (ROOT / "docs" / "video.md").read_text(encoding="utf-8")
    for source in sources:
        policy = dropflow.load_policy(source)
        resolve(policy, BackboneShape(12, 36))
        assert f"| `{policy.name}` |" in page
    around(ROOT / "docs" / "video.md", "comparison")  # where `make results-video` writes


def test_the_training_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    Path("my-policy.yaml").write_text(yaml.safe_dump(HIDROP))
    data = Prompts()
    known: dict[str, Any] = {"model": freeze_tower(tiny_llava()), "dataset": data, "collate": collate}
    known["prompts"] = {k: v for k, v in collate([data[0], data[1]], "left").items() if k != "labels"}
    known["loader"] = [collate([data[0], data[1]]), collate([data[3], data[4]])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Trainer, PEFT and the CPU: this is about our lines
        for block in blocks("docs/training.md", "python"):
            if "from trl" not in block.text:  # these run where TRL is installed: tests/core/stacks/test_trl.py
                exec(block.text, known)
    assert known["flow"].policy == dropflow.load_policy(HIDROP)
    assert known["scored"].logits.shape[1] == known["kept"] + 1
    for folder in ("trained", "trained-again", "merged"):
        assert '"dropflow"' in Path(folder, "config.json").read_text()
    *_, extending = blocks("docs/training.md", "yaml")
    Path("captions.yaml").write_text(extending.text)
    stages = dropflow.load_policy("captions.yaml", ["rescale=true"]).to_dict()["stages"]
    assert stages["exit"] == {"use": "hidrop/early-exit", "at": 24, "keep_last": True}


def test_the_recipes_of_the_training_page_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dropflow_lab.finetune.recipe_file import load_recipe

    monkeypatch.chdir(tmp_path)
    whole, dense, _ = blocks("docs/training.md", "yaml")
    Path("my-recipe.yaml").write_text(whole.text)
    Path("my-dense-recipe.yaml").write_text(dense.text)
    found = load_recipe("./my-dense-recipe.yaml")
    shipped = load_recipe("hidrop").stages
    for name, stage in load_recipe("./my-recipe.yaml").stages.items():
        assert found.stages[name] == stage == shipped[name].model_copy(update={"data": stage.data})
    assert found.dense is not None
    assert (found.dense.share, found.dense.distill) == (0.1, 1.0)


def test_the_table_of_methods_is_that_of_the_installed_stages(tmp_path: Path) -> None:
    document = ROOT / "docs" / "methods.md"
    if not document.exists():
        pytest.skip("the documents are not beside the tests")
    renewed = tmp_path / "methods.md"
    renewed.write_text(document.read_text(encoding="utf-8"), encoding="utf-8")
    renew(renewed, "table of stages", stages_in_markdown())
    same = renewed.read_text(encoding="utf-8") == document.read_text(encoding="utf-8")
    assert same, "renew it: dropflow list stages --into docs/methods.md"


def test_the_tables_of_refusals_are_those_of_the_source_code(tmp_path: Path) -> None:
    script, document = ROOT / "docs" / "refusals.py", ROOT / "docs" / "troubleshooting.md"
    if not script.exists():
        pytest.skip("the documents are not beside the tests")
    names = runpy.run_path(str(script))
    renewed = tmp_path / "troubleshooting.md"
    renewed.write_text(document.read_text(encoding="utf-8"), encoding="utf-8")
    names["write"](renewed)
    same = renewed.read_text(encoding="utf-8") == document.read_text(encoding="utf-8")
    assert same, "renew them: make troubleshooting"
    told = {(one.group, one.message): one for one in names["refusals"]()}
    for group, message, remedy in REFUSALS:
        assert told[group, message].remedy == remedy
    assert {one.group for one in told.values()} == set(names["GROUPS"])


REFUSALS = [
    ("policy files", "stages.…: vision would enter at boundary … but is gone from … on", "inject before the exit"),
    ("attaching", "attach: the policy … is already attached to this model", "detach it first"),
    ("caches and generate", "past_key_values: an offloaded cache is not supported", "use a plain DynamicCache"),
    (
        "stages",
        "stages.…: at boundary … `prune` returned weights that are not positive and finite for every visual token it "
        "keeps",
        "give 1 to these",
    ),
]
"""Of every way to write a message, one: in place, in a list of faults, in a helper."""


def test_the_code_about_traces_runs(tmp_path: Path) -> None:
    from dropflow_lab.digits.checkpoints.model import load, sample_image
    from dropflow_lab.inputs.prompts import build_inputs

    model, processor = load()
    picture = sample_image()
    inputs = build_inputs(processor, [([picture], "what digit is yellow ?")])
    names = {"model": model, "processor": processor, "picture": picture, "inputs": inputs, "path": tmp_path / "t.json"}
    for block in blocks("docs/trace.md", "python"):
        exec(block.text, names)
    assert names["html"].startswith("<!doctype html>")
