"""Answers in the form of OpenAI's API: whole, or as a stream of chunks."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

DONE = b"data: [DONE]\n\n"


def encoded(data: Any) -> bytes:
    """Return JSON in ASCII, so that any text can be sent, broken surrogates included."""
    return json.dumps(data, separators=(",", ":")).encode("ascii")


def event(data: Any) -> bytes:
    """Return one server-sent event."""
    return b"data: " + encoded(data) + b"\n\n"


class Reply:
    """The answer to one request, with an id of its own."""

    def __init__(self, model: str) -> None:
        """`model` is the served name with its policy."""
        self._told = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, text: str, reason: str, usage: dict[str, int]) -> bytes:
        """Return the answer in one piece."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return encoded(self._told | {"object": "chat.completion", "choices": [choice], "usage": usage})

    def opening(self) -> bytes:
        """Return the first chunk, which has no text."""
        return self._chunk({"role": "assistant", "content": ""}, None)

    def piece(self, text: str) -> bytes:
        """Return a chunk with a piece of the text."""
        return self._chunk({"content": text}, None)

    def closing(self, reason: str) -> bytes:
        """Return the last chunk of the answer."""
        return self._chunk({}, reason)

    def usage(self, usage: dict[str, int]) -> bytes:
        """Return the chunk that follows the answer if a client asks for the usage."""
        return event(self._told | {"object": "chat.completion.chunk", "choices": [], "usage": usage})

    def _chunk(self, delta: dict[str, str], reason: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event(self._told | {"object": "chat.completion.chunk", "choices": [choice]})


def usage_of(prompt: int, answer: int) -> dict[str, int]:
    """Return the counts of tokens; those of the prompt before anything is dropped."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
