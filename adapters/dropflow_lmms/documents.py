"""Documents of lmms-eval's tasks: what each asks, and how its answer is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dropflow_lab.errors import InputError
from dropflow_lab.inputs.prompts import Conversation
from dropflow_lmms.generation import Generation

_KINDS = ("text", "image", "video")


class Document:
    """One document of a task, and what has been answered to it."""

    def __init__(self, arguments: Sequence[Any], datasets: Mapping[str, Any]) -> None:
        """`arguments` are those of a request to a chat model; `datasets` maps task and split to documents.

        Raises `InputError` for settings of generation that are not known.
        """
        _, self._messages, generation, number, task, split = arguments
        self._where = f"{task}: document {number}"
        self._content = datasets[task][split][number]
        self.generation = Generation.of(generation or {})
        self.said: list[str] = []
        """The answers of the rounds so far."""
        self._told: Any = None

    def first(self) -> Conversation:
        """Return the messages of the only or first round."""
        return conversation(self._messages(self._content), self._where)

    def next(self) -> Conversation | None:
        """Return the messages of the round after those that have been answered; `None` if there is none."""
        found = self._messages(
            self._content,
            round_idx=len(self.said),
            previous_output=list(self.said),
            previous_round_info=self._told,
        )
        if not isinstance(found, tuple) or len(found) != 4:
            return None
        messages, ended, _, self._told = found
        return None if ended else conversation(messages, self._where)


def pads(request: Any) -> bool:
    """Whether a request only gives a rank as many as the others have; its answer is thrown away."""
    return bool((request.metadata or {}).get("__padding_only__"))


def grouped(documents: Sequence[Document]) -> dict[Generation, list[int]]:
    """Return the places of documents by how their answers are generated."""
    found: dict[Generation, list[int]] = {}
    for place, document in enumerate(documents):
        found.setdefault(document.generation, []).append(place)
    return found


def conversation(messages: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    """Return messages with text, pictures and videos, in their order, as chat templates take them.

    Raises `InputError`, which names `where`, for what would otherwise be ignored: sound, and a video of which only a
    part is meant.
    """
    return [
        {"role": message["role"], "content": [_part(part, where) for part in _parts(message["content"])]}
        for message in messages
    ]


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _part(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = part["type"]
    if kind not in _KINDS:
        raise InputError(f"{where}: expected text, pictures and videos, got {kind!r}; policies apply to these alone")
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    content = part["url"]
    bounds = [name for name in ("start_time", "end_time") if part.get(name) is not None]
    if bounds or isinstance(content, Mapping):
        said = ", ".join(bounds or sorted(content))
        raise InputError(f"{where}: expected a whole video or picture, got one with {said}; cut it beforehand")
    return {"type": kind, kind: content}
