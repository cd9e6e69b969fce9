"""Model folders that are broken are refused in one line, and nothing is fetched."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dropflow
from dropflow_lab.digits.data.clip_questions import CLIP_WORDS
from dropflow_lab.errors import InputError
from dropflow_lab.inputs import models
from dropflow_lab.inputs.models import load_model, policy_of
from dropflow_lab.inputs.widths import read_widths

WEIGHTS = "model.safetensors"


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder to break, on a machine without a network."""

    def connect(*_: Any) -> None:
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return Path(shutil.copytree(model_folder, tmp_path / "copied"))


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        load_model(folder)
    assert str(error.value).startswith(f"{folder}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    return str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"model_type": "no-such-model"}',
        b'{"model_type": "llava", "text_config": 7}',
        b'{"model_type": "llava", "text_config": {"hidden_size": "wide"}}',
        b'{"model_type": "own", "auto_map": {"AutoConfig": "config.Own"}}',
    ],
)
def test_a_broken_config(copied, content) -> None:
    (copied / "config.json").write_bytes(content)
    assert "transformers cannot load this model" in refused(copied)
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        read_widths(copied)


def test_weights_that_are_not_whole(copied) -> None:
    held = load_file(copied / WEIGHTS)
    name = next(name for name in held if name.endswith("q_proj.weight"))
    save_file({other: weight for other, weight in held.items() if other != name}, copied / WEIGHTS, {"format": "pt"})
    assert "expected all weights of the model, 1 are missing, such as" in refused(copied)
    save_file(held | {name: torch.zeros(3, 3)}, copied / WEIGHTS, {"format": "pt"})
    refused(copied)
    (copied / WEIGHTS).write_bytes((copied / WEIGHTS).read_bytes()[:1000])
    refused(copied)
    (copied / WEIGHTS).unlink()
    refused(copied)


def test_a_broken_processor(copied) -> None:
    (copied / "tokenizer.json").write_text(json.dumps({"version": 1}))
    assert "transformers cannot load this model: " in refused(copied)


@pytest.mark.parametrize("command", [("run", "--model"), ("serve", "--port", "0")])
def test_a_recorded_policy_whose_stages_lack_their_weights_is_refused_and_not_run_untrained(
    copied: Path, cli: Any, command: tuple[str, ...]
) -> None:
    model, _ = load_model(copied)
    pyramid = {"use": "hidrop/concave-pyramid", "keep": {1: 72, 2: 36}, "learn": True, "budget": {"average_tokens": 80}}
    with dropflow.attach(model, {"name": "learns", "stages": {"pyramid": pyramid}}):
        model.save_pretrained(copied)
    loaded, _ = load_model(copied)
    assert policy_of(loaded, ["positions=persistent"]).positions == "persistent"
    assert dropflow.flow_of(loaded) is None
    (copied / "dropflow.safetensors").unlink()
    if command[0] == "serve":
        pytest.importorskip("uvicorn", reason="uvicorn is of the extra `serve`")
    result = cli(*command, copied)
    assert (result.exit_code, isinstance(result.exception, SystemExit)) == (2, True)
    assert "the recorded policy has trained weights, but" in result.stderr


def test_options_of_transformers(copied: Path) -> None:
    assert load_model(Path("hidrop"))[0].dtype == torch.float32
    assert load_model(Path("hidrop"), dtype="float16")[0].dtype == torch.float16
    model, _ = load_model(copied, attn_implementation="eager", device_map="cpu")
    assert (model.config.text_config._attn_implementation, model.dtype) == ("eager", torch.bfloat16)
    assert not model.training


def test_a_folder_without_a_model_hides_no_embedded_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("clips").mkdir()  # as `dropflow digits sample --clips --out clips` writes one
    assert len(load_model(Path("clips"))[1].tokenizer) == len(CLIP_WORDS)
    Path("clips", "config.json").write_text("{}")
    with pytest.raises(InputError, match="clips: transformers cannot load this model"):
        load_model(Path("clips"))


def test_models_of_the_hub_are_looked_for_only_if_downloads_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def refuse(*_: Any, local_files_only: bool, **__: Any) -> Any:
        asked.append(local_files_only)
        raise OSError("no such model")

    monkeypatch.setattr(models.AutoModelForImageTextToText, "from_pretrained", refuse)
    with pytest.raises(InputError, match=r"no/such: expected a model folder with a config\.json, or the name.*clips"):
        load_model(Path("no/such"))
    with pytest.raises(InputError, match="no/such: transformers cannot load this model: no such model"):
        load_model(Path("no/such"), downloads=True)
    assert asked == [False]
