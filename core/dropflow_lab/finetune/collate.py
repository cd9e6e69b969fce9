"""Collates dialogues into training inputs: text from the chat template, with labels on the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dropflow_lab.errors import InputError

if TYPE_CHECKING:
    from dropflow_lab.digits.data.dialogues import Dialogue

IGNORED = -100
"""Label of a token that is not trained on."""
_EVERYWHERE, _PADDING = -1, -2


@dataclass
class _Row:
    """One sample: the part that all rounds share, up to the end of the picture, followed by the rounds."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    """Which round a token belongs to; `_EVERYWHERE` for the shared part."""

    def add(self, ids: Sequence[int], labels: Sequence[int], number: int, start: int) -> None:
        self.ids += ids
        self.labels += labels
        self.positions += range(start, start + len(ids))
        self.rounds += [number] * len(ids)


class Collator:
    """Packs the rounds of each sample after one picture, as if each were a separate prompt, and pads on the right.

    Position ids restart after the picture for every round, and the mask hides the other rounds, so that no answer can
    be copied from an earlier one. Labels are on the answers and on the end tokens that the chat template adds to them:
    the token before every labelled span is the last instruction token of its round, which is the one used by stages
    that rank by the instruction. The mask is for models whose layers all attend to the whole prompt.
    """

    def __init__(self, processor: Any) -> None:
        if getattr(processor, "chat_template", None) is None:
            raise InputError(
                "the model's processor has no chat template to arrange questions and answers; add one to its folder"
            )
        self._processor = processor

    def __call__(self, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
        """Return ids, labels and position ids (batch, tokens), the mask, and the pixels of all pictures.

        The mask is (batch, tokens), or additive (batch, 1, tokens, tokens) where a sample has several rounds.
        """
        first = [_messages(*dialogue.rounds[0]) for dialogue in dialogues]
        inputs = self._processor(
            images=[[dialogue.image] for dialogue in dialogues],
            text=[self._text(messages) for messages in first],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask").bool()
        rows = [self._row(d, ids[n][mask[n]].tolist()) for n, d in enumerate(dialogues)]
        rounds = _padded([row.rounds for row in rows], _PADDING)
        packed = any(len(dialogue.rounds) > 1 for dialogue in dialogues)
        return {
            **inputs,
            "input_ids": _padded([row.ids for row in rows], int(self._processor.tokenizer.pad_token_id or 0)),
            "attention_mask": _mask(rounds) if packed else (rounds != _PADDING).long(),
            "position_ids": _padded([row.positions for row in rows], 0),
            "labels": _padded([row.labels for row in rows], IGNORED),
        }

    def _row(self, dialogue: Dialogue, whole: list[int]) -> _Row:
        """Lay out a sample; `whole` holds its first round, with as many tokens as the picture takes."""
        row, shared = _Row(), [0]
        for number, (question, answer) in enumerate(dialogue.rounds):
            messages = _messages(question, answer)
            asked, answered = self._tokens(messages[:1], prompt=True), self._tokens(messages)
            if number == 0:
                shared = answered[: _last(answered, self._processor.image_token_id) + 1]
                before = len(whole) - len(answered) + len(shared)
                row.add(whole[:before], [IGNORED] * before, _EVERYWHERE, 0)
            tail, start = answered[len(shared) :], len(asked) - len(shared)
            follows = number > 0 or whole[before:] == tail
            if not follows or answered[: len(shared)] != shared or answered[: len(asked)] != asked:
                raise InputError(
                    "the answer cannot be located in this model's chat template: expected the picture before the "
                    "question, and the answer at the end of the prompt; train with your own script and dropflow.attach"
                )
            row.add(tail, [IGNORED] * start + tail[start:], number, before)
        return row

    def _text(self, messages: Sequence[dict[str, Any]], *, prompt: bool = False) -> str:
        return str(self._processor.apply_chat_template(list(messages), add_generation_prompt=prompt))

    def _tokens(self, messages: Sequence[dict[str, Any]], *, prompt: bool = False) -> list[int]:
        """Return the tokens of the text, in which one placeholder stands for the picture."""
        text = self._text(messages, prompt=prompt)
        return list(self._processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def _messages(question: str, answer: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def _last(ids: Sequence[int], token: int) -> int:
    return max((place for place, found in enumerate(ids) if found == token), default=-1)


def _padded(rows: Sequence[list[int]], fill: int) -> Int[Tensor, "batch tokens"]:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def _mask(rounds: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch 1 tokens tokens"]:
    """Return the mask: 0 for visible tokens, very low elsewhere; padding sees the shared part, but not itself."""
    asks, seen = rounds[:, :, None], rounds[:, None, :]
    causal = torch.ones(rounds.shape[1], rounds.shape[1], dtype=torch.bool).tril()
    visible = causal & ((seen == _EVERYWHERE) | ((asks == seen) & (asks != _PADDING)))
    mask = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min / 2)
    return mask[:, None]
