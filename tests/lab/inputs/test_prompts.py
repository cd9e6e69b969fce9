"""Prompts of questions about pictures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dropflow_lab.digits.checkpoints.model import build_processor, sample_image
from dropflow_lab.errors import InputError
from dropflow_lab.inputs.data import Sample
from dropflow_lab.inputs.prompts import build_conversations, build_inputs, check_questions

TEMPLATED = ["<s>", "user", ":", "is", "there", "a", "7", "?", "assistant", ":"]


def test_a_prompt_follows_the_chat_template() -> None:
    processor = build_processor()
    inputs = build_inputs(processor, [([sample_image()] * 2, "is there a 7 ?")])
    words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert [word for word in words if word != "<image>"] == TEMPLATED
    assert words.count("<image>") == 2 * 144
    assert inputs["pixel_values"].shape == (2, 3, 96, 96)


def test_the_placeholder_of_a_picture_is_refused_in_a_question() -> None:
    processor = build_processor()
    with pytest.raises(InputError, match="expected a text without '<image>', which stands for a picture in this model"):
        build_inputs(processor, [([sample_image()], "what is <image> ?")])
    samples = [Sample((), "what ?", "this", where="data.jsonl:1"), Sample((), "q", "a <image>", where="data.jsonl:2")]
    with pytest.raises(InputError, match=r"^data\.jsonl:2: expected a text without '<image>'"):
        check_questions(processor, samples)


def test_a_batch_is_padded_on_the_left() -> None:
    processor = build_processor()
    processor.tokenizer.padding_side = "right"
    asked = [([sample_image()], "is there a 7 ?"), ([sample_image()], "read all digits from left to right")]
    inputs = build_inputs(processor, asked)
    short, long = (len(question.split()) for _, question in asked)
    assert (inputs["attention_mask"] == 0).sum(1).tolist() == [long - short, 0]
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]


def test_without_a_template_the_question_follows_the_images() -> None:
    seen: dict[str, Any] = {}

    class Plain(SimpleNamespace):
        def __call__(self, **arguments: Any) -> dict[str, Any]:
            seen.update(arguments)
            return {}

    tokenizer = SimpleNamespace(pad_token=None, eos_token="</s>")
    processor = Plain(chat_template=None, image_token="<img>", tokenizer=tokenizer)
    build_inputs(processor, [([Image.new("RGB", (2, 2))] * 2, "what is it ?"), ([Image.new("RGB", (2, 2))], "who ?")])
    assert seen["text"] == ["<img>\n<img>\nwhat is it ?", "<img>\nwho ?"]
    assert [len(images) for images in seen["images"]] == [2, 1]
    assert (seen["padding"], seen["padding_side"], tokenizer.pad_token) == (True, "left", "</s>")


def test_without_a_template_a_conversation_is_one_question() -> None:
    processor = build_processor()
    processor.chat_template = None
    picture = {"type": "image", "image": sample_image()}
    words = [{"type": "text", "text": part} for part in ("is there", "a 7 ?")]
    asked = {"role": "user", "content": [picture, *words]}
    inputs = build_conversations(processor, [[asked]])
    expected = build_inputs(processor, [([sample_image()], "is there a 7 ?")])
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    video = {"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}
    for conversation in ([asked, asked], [video], [{**asked, "role": "system"}]):
        with pytest.raises(InputError, match="no chat template to arrange a conversation; send one user message alone"):
            build_conversations(processor, [conversation])
