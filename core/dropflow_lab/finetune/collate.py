"""Batches of dialogues as a model's training inputs: the chat template's text, with labels on the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dropflow_lab.errors import InputError

if TYPE_CHECKING:
    from dropflow_lab.digits.dialogues import Dialogue

IGNORED = -100
"""Label of a token that is not learnt."""


class Collator:
    """Pads a batch of dialogues on the right, and labels each answer with the end that the chat template gives it.

    The token in front of every labelled span is then the last instruction token of its round, which is what stages
    that rank by the instruction look for. Padding on the right keeps positions as they are in a prompt by itself.
    """

    def __init__(self, processor: Any) -> None:
        if getattr(processor, "chat_template", None) is None:
            raise InputError("this model's processor has no chat template, which says how questions and answers stand")
        self._processor = processor

    def __call__(self, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
        """Return `input_ids`, `attention_mask`, `labels` (batch, tokens) and the pixels of all pictures."""
        messages = [_messages(dialogue) for dialogue in dialogues]
        inputs = self._processor(
            images=[[dialogue.image] for dialogue in dialogues],
            text=[self._text(said) for said in messages],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for row, said in enumerate(messages):
            ids = inputs["input_ids"][row, : int(inputs["attention_mask"][row].sum())]
            for answer in self._answers(said, ids.tolist()):
                labels[row, answer] = ids[answer]
        return {**inputs, "labels": labels}

    def _text(self, messages: Sequence[dict[str, Any]], *, prompt: bool = False) -> str:
        return str(self._processor.apply_chat_template(list(messages), add_generation_prompt=prompt))

    def _tokens(self, text: str) -> list[int]:
        return list(self._processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _answers(self, messages: Sequence[dict[str, Any]], ids: Sequence[int]) -> list[slice]:
        """Places of the answers in `ids`, which has more tokens per picture than the text: all in front of them."""
        added = len(ids) - len(self._tokens(self._text(messages)))
        places = []
        for end in range(2, len(messages) + 1, 2):
            asked = self._tokens(self._text(messages[: end - 1], prompt=True))
            answered = self._tokens(self._text(messages[:end]))
            place = slice(added + len(asked), added + len(answered))
            if answered[: len(asked)] != asked or list(ids[place]) != answered[len(asked) :]:
                raise InputError(
                    "this model's chat template does not let an answer be found: expected each round to go on where "
                    "the prompt in front of it ends; train with labels of your own and `dropflow.attach` in your script"
                )
            places.append(place)
        return places


def _messages(dialogue: Dialogue) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(dialogue.rounds):
        picture = [{"type": "image"}] if number == 0 else []
        messages.append({"role": "user", "content": [*picture, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages
