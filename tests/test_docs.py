"""The code in the documents runs."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import prompt, tiny_llava

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


def test_the_stage_of_the_page_on_soft_selection_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "softly.py"
    file.write_text(blocks("docs/soft-selection.md", "python")[0], encoding="utf-8")
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
