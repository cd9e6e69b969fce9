"""Turns the tokens of an answer into pieces of text, as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no character yet."""


class Pieces:
    """The text of one answer: all pieces together are the text of all its tokens, up to the first stop text.

    A piece is held back while its last character lacks bytes, and while it may be the beginning of a stop text. Only
    the last tokens are decoded again, so a token costs the same however long the answer is.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        """`decode` returns the text of tokens; `stops` are texts before which the answer ends."""
        self._decode, self._stops = decode, tuple(stops)
        self._tokens: list[int] = []
        self._start = self._read = 0  # tokens from `_start` are decoded again, those before `_read` are text already
        self._held = ""
        self.stopped = False
        """Whether a stop text has been found; nothing comes after it."""

    def push(self, token: int) -> str:
        """Return the text that is certain after one more token."""
        self._tokens.append(token)
        text = self._new()
        if not text or text.endswith(_BROKEN):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._up_to_stop(text, last=False)

    def end(self) -> str:
        """Return the rest of the text, when no more tokens come."""
        return self._up_to_stop(self._new(), last=True)

    def _new(self) -> str:
        before = self._decode(self._tokens[self._start : self._read])
        return self._decode(self._tokens[self._start :])[len(before) :]

    def _up_to_stop(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The most characters at the end of `text` that are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
