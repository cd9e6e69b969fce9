"""Prepares each request's inputs alone, and joins those of several requests to one batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dropflow.errors import escaped
from dropflow_lab.errors import InputError
from dropflow_lab.inputs.prompts import build_conversations, question_of
from dropflow_lab.serve.api_error import ApiError

PER_TOKEN = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
"""Inputs with one number per token, which are padded."""
_PER_PICTURE = frozenset(
    {
        "pixel_values",
        "pixel_attention_mask",
        "image_grid_thw",
        "image_sizes",
        "image_position_ids",
        "spatial_shapes",
    }
)
"""Inputs whose first dimension counts pictures, tiles or patches, so that those of several prompts follow each other.

Others, such as Molmo2's indices into the patches of the whole batch, would point into the pictures of another prompt.
"""
_LONGEST_WORD = 64
"""Characters per token of the context beyond which a text is not even tokenised."""


@dataclass(frozen=True)
class Prompt:
    """The inputs of one request, with batch size 1."""

    inputs: dict[str, Any]
    question: str
    """Text of the last user message."""

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, before anything is dropped."""
        return int(self.inputs["input_ids"].shape[1])

    @cached_property
    def shape(self) -> tuple[Any, ...]:
        """What must be equal in two prompts for them to be joined: the inputs that there are, and sizes of pictures.

        A prompt with an input that is not known to be joinable equals only itself.
        """
        found: list[Any] = []
        for name, value in sorted(self.inputs.items()):
            if name not in PER_TOKEN | _PER_PICTURE or not isinstance(value, Tensor):
                return (id(self),)
            found.append((name, str(value.dtype), None if name in PER_TOKEN else tuple(value.shape[1:])))
        return tuple(found)


def prepare(processor: Any, conversation: Sequence[dict[str, Any]], context: int) -> Prompt:
    """Return the prompt of a conversation with opened pictures.

    Raises `ApiError` (400) if the model's processor does not take it, or if it has more than `context` tokens.
    """
    length = sum(len(part["text"]) for m in conversation for part in m["content"] if part["type"] == "text")
    if length > context * _LONGEST_WORD:
        raise ApiError(
            400, "context_length_exceeded", f"{length:,} characters do not fit {context:,} tokens", "messages"
        )
    try:
        inputs = dict(build_conversations(processor, [conversation]))
    except InputError as error:
        raise ApiError(400, "invalid_value", str(error), "messages") from None
    except Exception as error:  # templates and processors raise all kinds of errors on what they do not take
        logging.getLogger("dropflow.serve").info("a prompt was refused by the processor", exc_info=True)
        raise ApiError(
            400, "invalid_value", f"the model's processor refuses these messages: {escaped(error)}", "messages"
        ) from None
    prompt = Prompt(inputs, question_of(conversation))
    if prompt.tokens >= context:
        raise ApiError(
            400,
            "context_length_exceeded",
            f"expected a prompt of fewer than {context:,} tokens, got {prompt.tokens:,}; shorten it, or send fewer "
            "pictures",
            "messages",
        )
    return prompt


def joined(prompts: Sequence[Prompt], pad: int) -> dict[str, Any]:
    """Return the inputs of prompts of one `shape` as a batch, padded on the left with the token `pad`."""
    if len(prompts) == 1:
        return prompts[0].inputs
    longest = max(prompt.tokens for prompt in prompts)
    batch: dict[str, Any] = {}
    for name in prompts[0].inputs:
        values = [prompt.inputs[name] for prompt in prompts]
        if name in PER_TOKEN:
            fill = pad if name == "input_ids" else 0
            values = [torch.nn.functional.pad(one, (longest - one.shape[1], 0), value=fill) for one in values]
        batch[name] = torch.cat(values)
    return batch
