"""The code in the documents runs."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import prompt

import dropflow
from dropflow.plan import resolve
from dropflow.units import Shape

ROOT = Path(__file__).parents[1]


def blocks(name: str, language: str) -> list[str]:
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is not beside the tests")
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@torch.no_grad()
def test_the_stage_of_the_contributors_page_prunes(llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "contributed.py"
    file.write_text(blocks("CONTRIBUTING.md", "python")[0], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    stride = importlib.import_module("contributed").Stride
    which = {"name": "stride", "stages": {"s": {"use": stride, "at": 2, "step": 4}}}
    with dropflow.attach(llava, which) as flow:
        llava(**prompt([(3, "I", 5)]))
        visual = [layer.visual_tokens for layer in flow.report().layers]
    assert visual == [16, 16, 4, 4, 4, 4]


def test_the_makefile_has_the_readmes_two_commands() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not beside the tests")
    text = readme.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("demo", "test"):
        assert f"make {command}" in text
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)


def test_the_results_name_policies_that_fit_the_embedded_model() -> None:
    (command,) = blocks("docs/results.md", "sh")
    named = command.split("--policies ")[1].split()[0].split(",")
    table = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for source in named:
        policy = dropflow.load_policy(ROOT / source if source.endswith(".yaml") else source)
        resolve(policy, Shape(12, 144))
        assert f"| `{policy.name}` |" in table


def test_the_code_about_traces_runs(tmp_path: Path) -> None:
    from dropflow_lab import digits
    from dropflow_lab.comparison import prompt as ask

    model, processor = digits.load()
    picture = digits.sample_image()
    inputs = ask(processor, [picture], "what digit is yellow ?")
    names = {"model": model, "processor": processor, "picture": picture, "inputs": inputs, "path": tmp_path / "t.json"}
    for block in blocks("docs/trace.md", "python"):
        exec(block, names)
    assert names["html"].startswith("<!doctype html>")
