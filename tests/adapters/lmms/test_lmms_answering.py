"""Conversations with several pictures and videos are answered under a policy, and counted; needs no lmms-eval."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dropflow
import dropflow.testing
from dropflow_lab.compare.answers import ask
from dropflow_lab.errors import InputError
from dropflow_lab.inputs.data import Sample, read_samples
from dropflow_lab.inputs.models import load_model
from dropflow_lmms import answering
from dropflow_lmms.answering import Answering
from dropflow_lmms.arguments import read_arguments
from dropflow_lmms.generation import Generation

HALF = "stages:\n  drop: {use: control/stride, keep: {2: 0.5}}\n"
SHORT = Generation.of({"max_new_tokens": 12})


@pytest.fixture
def half(tmp_path: Path) -> str:
    (tmp_path / "half.yaml").write_text(HALF)
    return str(tmp_path / "half.yaml")


def asked(sample: Sample) -> list[dict[str, Any]]:
    pictures = [{"type": "image", "image": picture} for picture in sample.images()]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": sample.question}]}]


@pytest.mark.parametrize("policy", ["none", "hidrop-digits"])
def test_answers_and_averages_are_those_of_compare(policy: str) -> None:
    model = Answering(read_arguments({"pretrained": "dense", "policy": policy}))
    samples = read_samples("digits", 8)
    said = [one.text for start in (0, 4) for one in model.answer(list(map(asked, samples[start : start + 4])), SHORT)]
    dense, processor = load_model()
    chosen = None if policy == "none" else dropflow.load_policy(policy)
    with torch.no_grad():
        expected = ask(dense, processor, chosen, samples, batch=4, max_new_tokens=12)
    means = model.totals.prefill.means()
    assert tuple(said) == expected.said
    assert means["average_visual_tokens"] == pytest.approx(expected.average_visual_tokens)
    assert means["entry_visual_tokens"] == expected.entry_visual_tokens
    assert model.totals.prefill.prompts == 8


def test_a_recorded_policy_applies_and_overrides_change_it() -> None:
    recorded = Answering(read_arguments({"pretrained": "hidrop"}))
    changed = Answering(read_arguments({"pretrained": "hidrop", "overrides": "positions=compact;stages.exit.at=9"}))
    assert recorded.flow is not None
    assert recorded.flow.policy.name == "hidrop-digits"
    assert changed.flow is not None
    assert (changed.flow.policy.positions, changed.flow.plan.window.exit) == ("compact", 9)
    with pytest.raises(InputError, match="no policy is given, and dense records none; write policy=NAME, or policy=no"):
        Answering(read_arguments({"pretrained": "dense"}))


class _Tokens:
    """A processor that only counts: every conversation becomes the same tiny prompt."""

    chat_template = "template"

    def __init__(self, prompt: Any) -> None:
        self._prompt, self.seen = prompt, []
        self.tokenizer = SimpleNamespace(pad_token="p", pad_token_id=0, decode=lambda tokens, **_: str(tokens.tolist()))

    def apply_chat_template(self, conversations: Any, **options: Any) -> Any:
        self.seen.append((conversations, options["processor_kwargs"]))
        inputs = self._prompt(len(conversations))

        class Inputs(dict[str, Any]):
            def to(self, *_: Any) -> Any:
                return self

        return Inputs(inputs)


def test_several_pictures_and_videos_of_one_document(monkeypatch: pytest.MonkeyPatch, half: str) -> None:
    tiny = dropflow.testing.tiny_models()["qwen2_vl"][1]
    model = tiny.model()
    processor = _Tokens(lambda batch: tiny.prompt([(3, "I", 2, "V", 1, "I", 5)] * batch)[0])
    monkeypatch.setattr(answering, "load_model", lambda *_, **__: (model, processor))
    stated: list[str] = []
    original = dropflow.questions
    monkeypatch.setattr(dropflow, "questions", lambda texts: stated.extend(texts) or original(texts))
    parts = [("image", "a"), ("video", "b"), ("image", "c")]
    shown = [{"type": kind, kind: name} for kind, name in parts]
    messages = [{"role": "user", "content": [*shown, {"type": "text", "text": "what ?"}]}]
    found = Answering(read_arguments({"pretrained": "m", "policy": half, "fps": 2}))
    answers = found.answer([messages, messages], Generation.of({"max_new_tokens": 3}))
    inputs = tiny.prompt([(3, "I", 2, "V", 1, "I", 5)] * 2)[0]
    visual = int(sum((inputs["input_ids"] == one).sum() for one in (dropflow.testing.IMAGE, dropflow.testing.VIDEO)))
    assert [one.prompt_tokens for one in answers] == inputs["attention_mask"].sum(1).tolist()
    means = found.totals.prefill.means()
    assert means["entry_visual_tokens"] == visual / 2
    assert means["average_visual_tokens"] == (visual * 2 + visual / 2 * 4) / 6 / 2
    assert processor.seen[0] == ([messages, messages], {"padding": True, "padding_side": "left", "fps": 2.0})
    assert stated == ["what ?", "what ?"]
    pictures = [{"role": "user", "content": [shown[0], {"type": "text", "text": "?"}]}]
    found.answer([pictures], Generation.of({"max_new_tokens": 3}))
    assert processor.seen[1][1] == {}  # nothing about frames where there is no video
