"""One question with and without a policy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from dropflow import load_policy
from dropflow_lab.comparison import compare
from dropflow_lab.digits import sample_image
from dropflow_lab.models import load_model
from dropflow_lab.prompts import build_inputs

TEMPLATED = ["<s>", "user", ":", "is", "there", "a", "7", "?", "assistant", ":"]
KEEP_ALL = {"name": "keep-all", "stages": {"p": {"use": "hidrop/concave-pyramid", "keep": {1: 1.0}}}}


def test_a_policy_that_keeps_everything_changes_no_answer(model_folder) -> None:
    model, processor = load_model(model_folder)
    comparison = compare(model, processor, [sample_image()], "is there a 7 ?", load_policy(KEEP_ALL), 4)
    assert comparison.answer == comparison.answer_dense
    assert comparison.visual_tokens == 144
    assert comparison.report.flops == comparison.report.flops_dense


def test_the_model_is_detached_afterwards(model_folder) -> None:
    model, processor = load_model(model_folder)
    for _ in range(2):  # a policy that stayed attached would refuse the second
        compare(model, processor, [sample_image()], "is there a 7 ?", load_policy(KEEP_ALL), 1)


def test_a_prompt_follows_the_chat_template(model_folder) -> None:
    _, processor = load_model(model_folder)
    inputs = build_inputs(processor, [([sample_image()] * 2, "is there a 7 ?")])
    words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert [word for word in words if word != "<image>"] == TEMPLATED
    assert words.count("<image>") == 2 * 144
    assert inputs["pixel_values"].shape == (2, 3, 96, 96)


def test_without_a_template_the_question_follows_the_images() -> None:
    seen: dict[str, Any] = {}

    class Plain(SimpleNamespace):
        def __call__(self, **arguments: Any) -> dict[str, torch.Tensor]:
            seen.update(arguments)
            return {}

    prompt(Plain(chat_template=None, image_token="<img>"), [Image.new("RGB", (2, 2))] * 2, "what is it ?")
    assert seen["text"] == "<img>\n<img>\nwhat is it ?"
    assert len(seen["images"]) == 2
