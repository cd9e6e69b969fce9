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
    from PIL.Image import Image

    from dropflow_lab.digits.data.dialogues import Dialogue

IGNORED = -100
"""Label of a token that is not trained on."""
_EVERYWHERE, _PADDING = -1, -2
_NOT_LOCATED = "the answer cannot be located in this model's chat template: expected "
_REMEDY = "; train with your own script and dropflow.attach"


@dataclass
class _Row:
    """One sample: the part that all rounds share, up to the end of the pictures, followed by the rounds."""

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
    """Turns dialogues into a batch, padded on the right, with labels on the answers.

    The chat template arranges pictures and question, as at inference, and labels are on the answer and on the end
    tokens that the template adds to it: the token before every labelled span is the last instruction token of its
    round, which is the one used by stages that rank by the instruction.

    Several rounds of a sample are packed after the same pictures, as if each were a separate prompt: position ids
    restart after the pictures for every round, and the mask hides the other rounds, so that no answer can be copied
    from an earlier one. This is for models whose layers all attend to the whole prompt; see `packing_fault`.
    """

    def __init__(self, processor: Any) -> None:
        if getattr(processor, "chat_template", None) is None:
            raise InputError(
                "the model's processor has no chat template to arrange questions and answers; add one to its folder"
            )
        self._processor = processor
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    def __call__(self, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
        """Return what the model is called with: its processor's inputs, and labels (batch, tokens).

        Where a sample has several rounds, also position ids (batch, tokens), and the mask is additive (batch, 1,
        tokens, tokens).
        """
        inputs = self._processor.apply_chat_template(
            [_messages(*dialogue.rounds[0], dialogue.images) for dialogue in dialogues],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        if any(len(dialogue.rounds) > 1 for dialogue in dialogues):
            return self._packed(dict(inputs), dialogues)
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for row, dialogue in enumerate(dialogues):
            asked, answered = self._asked_and_answered(dialogue, *dialogue.rounds[0])
            answer, end = answered[len(asked) :], int(inputs["attention_mask"][row].sum())
            place = slice(end - len(answer), end)
            if not answer or inputs["input_ids"][row, place].tolist() != answer:
                raise InputError(f"{_NOT_LOCATED}it at the end of the prompt{_REMEDY}")
            labels[row, place] = torch.tensor(answer)
        return {**inputs, "labels": labels}

    def _packed(self, inputs: dict[str, Any], dialogues: Sequence[Dialogue]) -> dict[str, Any]:
        """Put the later rounds after the first."""
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask").bool()
        more = [name for name, value in inputs.items() if getattr(value, "shape", ())[:2] == ids.shape]
        if more:
            raise InputError(f"rounds: this model's processor says more of every token ({more[0]}); set rounds to 1")
        rows = [self._row(dialogue, ids[n][mask[n]].tolist()) for n, dialogue in enumerate(dialogues)]
        return {
            **inputs,
            "input_ids": _padded([row.ids for row in rows], int(self._processor.tokenizer.pad_token_id or 0)),
            "attention_mask": _mask(_padded([row.rounds for row in rows], _PADDING)),
            "position_ids": _padded([row.positions for row in rows], 0),
            "labels": _padded([row.labels for row in rows], IGNORED),
        }

    def _row(self, dialogue: Dialogue, whole: list[int]) -> _Row:
        """Lay out a sample; `whole` holds its first round, with as many tokens as the pictures take."""
        row, shared = _Row(), [0]
        for number, (question, answer) in enumerate(dialogue.rounds):
            asked, answered = self._asked_and_answered(dialogue, question, answer)
            if number == 0:
                shared = answered[: _last(answered, self._processor.image_token_id) + 1]
                before = len(whole) - len(answered) + len(shared)
                row.add(whole[:before], [IGNORED] * before, _EVERYWHERE, 0)
            tail, start = answered[len(shared) :], len(asked) - len(shared)
            follows = number > 0 or whole[before:] == tail
            if not follows or answered[: len(shared)] != shared:
                raise InputError(f"{_NOT_LOCATED}the picture before the question{_REMEDY}")
            row.add(tail, [IGNORED] * start + tail[start:], number, before)
        return row

    def _asked_and_answered(self, dialogue: Dialogue, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the tokens of the prompt, and those of prompt and answer; a placeholder stands for each picture."""
        messages = _messages(question, answer, dialogue.images)
        asked, answered = self._tokens(messages[:1], prompt=True), self._tokens(messages)
        if answered[: len(asked)] != asked:
            raise InputError(f"{_NOT_LOCATED}it after the prompt that is asked without it{_REMEDY}")
        return asked, answered

    def _tokens(self, messages: Sequence[dict[str, Any]], *, prompt: bool = False) -> list[int]:
        text = self._processor.apply_chat_template(list(messages), add_generation_prompt=prompt, tokenize=False)
        return list(self._processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def packing_fault(backbone: Any) -> str | None:
    """Return why rounds cannot be packed for a model, seen as a `Backbone`; `None` if they can."""
    kinds = {mixer.name for mixer in backbone.mixers}
    if kinds != {"full_attention"}:
        return f"it has layers that do not attend to the whole prompt ({', '.join(sorted(kinds))})"
    if not backbone.linear_positions:
        return "a token's position is more than one number in it"
    return None


def _messages(question: str, answer: str, images: Sequence[Image]) -> list[dict[str, Any]]:
    pictures = [{"type": "image", "image": image} for image in images]
    return [
        {"role": "user", "content": [*pictures, {"type": "text", "text": question}]},
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
