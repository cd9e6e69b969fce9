"""Two-turn conversations with the embedded model: accuracy of the second question, with and without recall."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow_lab.digits.data.dialogues import Dialogues
from dropflow_lab.inputs.models import load_model
from dropflow_lab.inputs.prompts import Conversation, build_conversations
from dropflow_lab.measure.intervals import Gain, Share
from dropflow_lab.measure.machine import Machine, this_machine, torch_threads

if TYPE_CHECKING:
    from dropflow_lab.digits.data.dialogues import Dialogue

RANK: Mapping[str, Any] = {"name": "rank", "stages": {"rank": {"use": "fastv/attention-rank", "at": 3, "keep": 10}}}
"""A policy that keeps those 10 of 144 visual tokens that the question reads most in layer 2."""
TOKENS = 12
"""Most tokens of an answer."""


@dataclass(frozen=True)
class RecallRow:
    """One way to run the model."""

    name: str
    """`dense`, `without recall` or `recall`."""
    asked_first: Share
    """Accuracy of the second question, asked in a conversation of its own."""
    asked_second: Share
    """Accuracy of the same question, asked in the second turn."""
    loss: Gain
    """The second less the first."""


@dataclass(frozen=True)
class RecallBench:
    """Accuracy of second questions; all rows ask the same."""

    rows: tuple[RecallRow, ...]
    gain: Gain
    """Accuracy in the second turn with recall, less that without."""
    parked_bytes: int
    """What one conversation parks."""
    policy: Mapping[str, Any]
    model: str
    questions: int
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def bench_recall(
    questions: int = 300,
    *,
    model: str = "conversations",
    policy: Mapping[str, Any] = RANK,
    threads: int = 1,
    seed: int = 5,
) -> RecallBench:
    """Ask two questions about each of so many pictures of the test split, the second one also in a first turn."""
    data = Dialogues(questions, rounds=2, seed=seed, split="test")
    own, processor = load_model(Path(model))
    ways = {"dense": None, "without recall": {**policy, "recall": False}, "recall": {**policy, "recall": True}}
    rows, seconds, parked = [], {}, 0
    with torch_threads(threads), torch.no_grad():
        for name, which in ways.items():
            with nullcontext() if which is None else dropflow.attach(own, which):
                talks = [_Talk(own, processor, data[number]) for number in range(questions)]
                first = [talk.asked_first() for talk in talks]
                second = [talk.asked_second() for talk in talks]
            rows.append(RecallRow(name, Share.of(first), Share.of(second), Gain.of(second, first)))
            seconds[name] = second
            parked = max(parked, talks[0].parked_bytes)
        gain = Gain.of(seconds["recall"], seconds["without recall"])
        return RecallBench(tuple(rows), gain, parked, policy, model, questions, this_machine())


class _Talk:
    """Two questions about one picture."""

    def __init__(self, model: Any, processor: Any, dialogue: Dialogue) -> None:
        self._model, self._processor, self._dialogue = model, processor, dialogue
        self.parked_bytes = 0

    def asked_first(self) -> float:
        """Whether the second question is answered rightly in a conversation of its own."""
        question, answer = self._dialogue.rounds[1]
        return float(self._said(self._answered([self._shown(question)], self._cache())) == answer)

    def asked_second(self) -> float:
        """Whether it is answered rightly after the first one and its answer."""
        (first, _), (second, answer) = self._dialogue.rounds
        cache = self._cache()
        said = self._said(self._answered([self._shown(first)], cache))
        self.parked_bytes = dropflow.parked_bytes(cache)
        turns = [self._shown(first), _text("assistant", said), _text("user", second)]
        return float(self._said(self._answered(turns, cache)) == answer)

    def _shown(self, question: str) -> dict[str, Any]:
        content = [{"type": "image", "image": image} for image in self._dialogue.images]
        return {"role": "user", "content": [*content, {"type": "text", "text": question}]}

    def _cache(self) -> DynamicCache:
        return DynamicCache(config=self._model.config.get_text_config(decoder=True))

    def _answered(self, conversation: Conversation, cache: DynamicCache) -> torch.Tensor:
        """Token ids of the answer; what the cache has seen of the conversation is not fed again."""
        inputs = dict(build_conversations(self._processor, [conversation]))
        if cache.get_seq_length():
            ids = inputs["input_ids"]
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        made = self._model.generate(**inputs, **{CACHE_ARGUMENT: cache}, do_sample=False, max_new_tokens=TOKENS)
        answer: torch.Tensor = made[0, inputs["input_ids"].shape[1] :]
        return answer

    def _said(self, answer: torch.Tensor) -> str:
        text: str = self._processor.tokenizer.decode(answer, skip_special_tokens=True)
        return text.strip()


def _text(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}
