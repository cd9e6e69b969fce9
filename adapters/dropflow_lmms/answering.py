"""Answers conversations under a policy, and sums up what they took."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dropflow
from dropflow_lab.errors import InputError
from dropflow_lab.inputs.models import load_model
from dropflow_lab.inputs.prompts import Conversation, build_conversations, question_of
from dropflow_lab.measure.prefill import Prefill
from dropflow_lmms.arguments import Arguments
from dropflow_lmms.generation import Generation
from dropflow_lmms.totals import Totals


@dataclass(frozen=True)
class Answer:
    """One answer."""

    text: str
    """The text before the first of the task's stop texts."""
    prompt_tokens: int
    """Tokens of the prompt, before anything is dropped."""
    tokens: int
    """Generated tokens, the end token included."""


class Answering:
    """A model with its processor and policy."""

    def __init__(self, arguments: Arguments) -> None:
        """Load the model and attach the policy; raises what loading and attaching raise."""
        options = arguments.loading
        self.model, self._processor = load_model(Path(arguments.pretrained), downloads=True, **options)
        if arguments.device not in (None, "cuda"):  # `cuda` is the GPU of this process
            self.model = self.model.to(arguments.device)
        self._sampling = arguments.sampling
        self._backbone = dropflow.backbone_for(self.model, arguments.adapter)
        self.flow = None if arguments.dense else _attached(self.model, arguments)
        self.totals = Totals()

    @torch.no_grad()
    def answer(self, conversations: Sequence[Conversation], generation: Generation) -> list[Answer]:
        """Return the answers to a batch of conversations; whatever processor, engine and model raise is passed on."""
        inputs = self._inputs(conversations)
        tokenizer = self._processor.tokenizer
        began = time.perf_counter()
        with dropflow.questions([question_of(one) for one in conversations]):
            out = self.model.generate(**inputs, pad_token_id=tokenizer.pad_token_id, **generation.options)
        seconds = time.perf_counter() - began
        lengths = inputs["attention_mask"].sum(1).tolist()
        answers = []
        for tokens, length in zip(out[:, inputs["input_ids"].shape[1] :], lengths, strict=True):
            text = generation.cut(tokenizer.decode(tokens, skip_special_tokens=True))
            answers.append(Answer(text, length, self._generated(tokens.tolist())))
        took = Prefill.of(self._backbone, self.flow, inputs)
        self.totals += Totals(took, sum(one.tokens for one in answers), seconds)
        return answers

    def _inputs(self, conversations: Sequence[Conversation]) -> Any:
        parts = [part for messages in conversations for message in messages for part in message["content"]]
        sampling = self._sampling if any(part["type"] == "video" for part in parts) else {}
        inputs = build_conversations(self._processor, conversations, **sampling)
        return inputs.to(self.model.device, self.model.dtype)

    def _generated(self, tokens: Sequence[int]) -> int:
        """The number of tokens up to the first end token."""
        ends = self.model.generation_config.eos_token_id
        known = set(ends if isinstance(ends, list) else [ends])
        return next((place for place, token in enumerate(tokens, 1) if token in known), len(tokens))


def _attached(model: Any, arguments: Arguments) -> dropflow.Flow:
    options: Mapping[str, Any] = {
        "overrides": arguments.overrides,
        "adapter": arguments.adapter,
        "weights": arguments.weights,
    }
    try:
        return dropflow.attach(model, arguments.policy, **options)
    except dropflow.errors.PolicyError as error:
        if arguments.policy is None and getattr(model.config, "dropflow", None) is None:
            raise InputError(
                f"model_args: no policy is given, and {arguments.pretrained} records none; write policy=NAME, or "
                "policy=none to run it without a policy"
            ) from error
        raise
