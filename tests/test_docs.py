"""The code in the documents runs."""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import HIDROP, prompt, tiny_llava
from training import Prompts, collate, freeze_tower

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


def test_the_training_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    Path("my-policy.yaml").write_text(yaml.safe_dump(HIDROP))
    data = Prompts()
    known: dict[str, Any] = {"model": freeze_tower(tiny_llava()), "dataset": data, "collate": collate}
    known["loader"] = [collate([data[0], data[1]]), collate([data[3], data[4]])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Trainer, PEFT and the CPU: this is about our lines
        for block in blocks("docs/training.md", "python"):
            exec(block, known)
    assert known["flow"].policy == dropflow.load_policy(HIDROP)
    for folder in ("trained", "trained-again", "merged"):
        assert '"dropflow"' in Path(folder, "config.json").read_text()
    (extending,) = blocks("docs/training.md", "yaml")
    Path("captions.yaml").write_text(extending)
    stages = dropflow.load_policy("captions.yaml", ["rescale=true"]).to_dict()["stages"]
    assert stages["exit"] == {"use": "hidrop/early-exit", "at": 24, "keep_last": True}
