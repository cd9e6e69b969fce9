"""The example for VLMEvalKit, with a stand-in where that is not installed: it asks as VLMEvalKit's models are asked."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from documents import ROOT

from dropflow_lab.compare.answers import ask
from dropflow_lab.compare.lineup import policy_of
from dropflow_lab.inputs.data import read_samples
from dropflow_lab.inputs.models import load_model

EXAMPLE = ROOT / "docs" / "examples" / "run_vlmevalkit.py"


class BaseModel:
    """What VLMEvalKit's base class does of interest here: it hands messages of known kinds to `generate_inner`."""

    allowed_types = ("text", "image", "video")

    def __init__(self) -> None:
        self.dump_image_func = None

    def generate(self, message: list[dict[str, str]], dataset: str | None = None) -> Any:
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)  # type: ignore[attr-defined]  # of the subclass


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example, loaded beside VLMEvalKit or its stand-in."""
    if not EXAMPLE.exists():
        pytest.skip("the documents are not beside the tests")
    if importlib.util.find_spec("vlmeval") is None:
        made = {name: ModuleType(name) for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base", "vlmeval.config")}
        made["vlmeval"].vlm, made["vlmeval"].config = made["vlmeval.vlm"], made["vlmeval.config"]
        made["vlmeval.vlm.base"].BaseModel = BaseModel
        made["vlmeval.config"].supported_VLM = {}
        for name, module in made.items():
            monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("run_vlmevalkit", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_answers_are_those_of_compare(example: Any, tmp_path: Path) -> None:
    asked = read_samples("digits", 6)
    own = example.DropflowVLM(max_new_tokens="16", pretrained="hidrop", device="cpu")
    said = []
    for number, sample in enumerate(asked):
        path = tmp_path / f"{number}.png"
        sample.images()[0].save(path)
        said.append(own.generate([{"type": "image", "value": str(path)}, {"type": "text", "value": sample.question}]))
    model, processor = load_model(Path("hidrop"))
    with torch.no_grad():
        expected = ask(model, processor, policy_of(model), asked, batch=1, max_new_tokens=16)
    assert tuple(said) == expected.said
    assert own.means()["visual_tokens_per_layer"] == pytest.approx(expected.average_visual_tokens)


def test_it_is_registered_before_vlmevalkit_runs(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.py").write_text(
        "import sys\nfrom vlmeval.config import supported_VLM\n"
        "made = supported_VLM['dropflow']()\n"
        "assert sys.argv[1:] == ['--model', 'dropflow', '--data', 'POPE']\n"
        "assert made._answering.flow.policy.name == 'hidrop-digits'\n"
        "print('it ran')\n"
    )
    before = [*sys.path]
    monkeypatch.setattr(sys, "argv", ["run", str(tmp_path), "pretrained=dense,policy=hidrop-digits", "--data", "POPE"])
    monkeypatch.setattr(sys, "path", before)
    example.main()
    assert capsys.readouterr().out.endswith("it ran\n")
