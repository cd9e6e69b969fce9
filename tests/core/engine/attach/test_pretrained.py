"""A checkpoint that records a policy is loaded with it, and a log line says so if it runs without it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import HIDROP, RAGGED, prompt, tiny_llava
from transformers import LlavaForConditionalGeneration

import dropflow
from dropflow.errors import PolicyError
from dropflow.policy.recorded import note_dense


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose config records HIDROP."""
    folder = tmp_path_factory.mktemp("recorded")
    model = tiny_llava()
    with dropflow.attach(model, HIDROP):
        model.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_the_recorded_policy_is_attached_and_the_log_says_so(checkpoint: Path, caplog: Any) -> None:
    inputs, model = prompt(), tiny_llava()
    with dropflow.attach(model, HIDROP):
        expected = model(**inputs).logits
    with caplog.at_level(logging.INFO, logger="dropflow"):
        loaded = dropflow.from_pretrained(checkpoint)
    assert caplog.messages == [
        f"{checkpoint}: the recorded policy 'test' is attached; dropflow.detach(model) takes it off"
    ]
    assert torch.equal(loaded(**inputs).logits, expected)
    flow = dropflow.flow_of(loaded)
    assert isinstance(flow, dropflow.Flow)
    assert flow.policy.stages.keys() == HIDROP["stages"].keys()
    dropflow.detach(loaded)
    assert dropflow.flow_of(loaded) is None
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_another_policy_and_overrides_may_be_given(checkpoint: Path) -> None:
    inputs, model = prompt(), tiny_llava()
    with dropflow.attach(model, RAGGED) as flow:
        model(**inputs)
        expected = flow.live()
    loaded = dropflow.from_pretrained(checkpoint, RAGGED, model_class=LlavaForConditionalGeneration, dtype="auto")
    loaded(**inputs)
    given = dropflow.flow_of(loaded)
    assert isinstance(given, dropflow.Flow)
    assert torch.equal(given.live(), expected)
    changed = dropflow.from_pretrained(checkpoint, overrides=["stages.exit.at=6"])
    recorded = dropflow.flow_of(changed)
    assert isinstance(recorded, dropflow.Flow)
    assert recorded.policy.stages["exit"].options.at == 6


def test_without_a_policy_nothing_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    del config["dropflow"]
    (tmp_path / "config.json").write_text(json.dumps(config))  # no weights are needed: none are looked for
    with pytest.raises(PolicyError, match="no policy is given, and none is recorded in this model's config"):
        dropflow.from_pretrained(tmp_path)


def test_a_word_where_a_recorded_policy_does_not_count(checkpoint: Path, caplog: Any) -> None:
    dense = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    note_dense(dense.config)
    note_dense(tiny_llava(layers=1).config)
    assert caplog.messages == [
        "this model runs dense, though its config records the policy 'test'; dropflow.attach(model) applies it"
    ]
