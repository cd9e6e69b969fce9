"""Builds a model's inputs from questions about pictures, and generates its answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dropflow_lab.errors import InputError, shortened

if TYPE_CHECKING:
    from PIL.Image import Image

    import dropflow
    from dropflow_lab.inputs.data import Sample

_PLACEHOLDERS = ("image_token", "video_token")
"""Attributes of a processor that hold its placeholder for pictures."""
Question = tuple[Sequence["Image"], str]
"""Pictures, and a question about all of them."""
Conversation = Sequence[dict[str, Any]]
"""Messages with `role` and `content`, a list of parts: `{"type": "text", "text": ...}` or `{"type": "image", ...}`."""


def build_inputs(processor: Any, questions: Sequence[Question]) -> Any:
    """Return the model's inputs for a batch of questions, padded on the left, as generation needs it.

    The processor's chat template arranges pictures and question; without one, the pictures come first. A
    tokenizer without a padding token pads with its end token. Raises `InputError` for a question that contains the
    placeholder for a picture.
    """
    if getattr(processor, "chat_template", None) is None:
        for _, question in questions:
            check_text(processor, question)
        texts = [f"{processor.image_token}\n" * len(images) + question for images, question in questions]
        padding = _padding(processor, len(questions))
        return processor(images=[list(images) for images, _ in questions], text=texts, return_tensors="pt", **padding)
    return build_conversations(
        processor, [[{"role": "user", "content": _content(images, question)}] for images, question in questions]
    )


def build_conversations(processor: Any, conversations: Sequence[Conversation], **options: Any) -> Any:
    """Return the model's inputs for a batch of conversations, arranged by the processor's chat template.

    Otherwise as `build_inputs`: without a chat template, a conversation is one user message with pictures and text.
    `options` are handed to the processor, such as `num_frames` of videos. Raises `InputError` for a text that contains
    the placeholder for a picture, and for a conversation that needs a chat template where there is none.
    """
    if getattr(processor, "chat_template", None) is None:
        return build_inputs(processor, [_only_question(one) for one in conversations])
    for conversation in conversations:
        for part in (part for message in conversation for part in message["content"]):
            if part["type"] == "text":
                check_text(processor, part["text"])
    return processor.apply_chat_template(
        [list(conversation) for conversation in conversations],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=_padding(processor, len(conversations)) | options,
    )


def _only_question(conversation: Conversation) -> Question:
    parts = conversation[0]["content"]
    alone = len(conversation) == 1 and conversation[0]["role"] == "user"
    if not alone or any(part["type"] not in ("image", "text") for part in parts):
        raise InputError(
            "this model's processor has no chat template to arrange a conversation; send one user message alone, its "
            "pictures before its text"
        )
    return [part["image"] for part in parts if part["type"] == "image"], question_of(conversation)


def question_of(conversation: Conversation) -> str:
    """Return the text of the last user message, for stages that read the question."""
    asked = [message for message in conversation if message["role"] == "user"]
    parts = asked[-1]["content"] if asked else []
    return " ".join(part["text"] for part in parts if part["type"] == "text")


def _padding(processor: Any, batch: int) -> dict[str, Any]:
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None and getattr(tokenizer, "pad_token", None) is None:
        tokenizer.pad_token = tokenizer.eos_token
    return {"padding": True, "padding_side": "left"} if batch > 1 else {}


def check_questions(processor: Any, samples: Iterable[Sample]) -> None:
    """Raise `InputError` naming file and line for questions and answers that contain the placeholder for a picture."""
    for sample in samples:
        for text in (sample.question, sample.answer or ""):
            try:
                check_text(processor, text)
            except InputError as error:
                raise InputError(f"{sample.where or 'question'}: {error}") from None


def check_text(processor: Any, text: str) -> None:
    """Raise `InputError` for a text that contains the processor's placeholder for a picture."""
    for attribute in _PLACEHOLDERS:
        token = getattr(processor, attribute, None)
        if isinstance(token, str) and token and token in text:
            raise InputError(
                f"expected a text without {token!r}, which stands for a picture in this model's prompts, got "
                f"{shortened(repr(text))}; leave it out, the pictures go before the question"
            )


def _content(images: Sequence[Image], question: str) -> list[dict[str, Any]]:
    return [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]


def generate(
    model: Any, processor: Any, inputs: Any, max_new_tokens: int, prefix: dropflow.Prefix | None = None
) -> list[str]:
    """Return the greedy answers to a batch of prompts, which begin with `prefix` if there is one."""
    inputs = inputs.to(model.device, model.dtype)
    given = inputs if prefix is None else prefix.inputs(**inputs)
    with torch.no_grad():
        out = model.generate(**given, do_sample=False, max_new_tokens=max_new_tokens)
    new = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
