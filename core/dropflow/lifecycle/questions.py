"""Questions as text: the model gets token ids, but a stage may read the question with an encoder of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from dropflow.errors import UnsupportedCall, quoted

_asked: ContextVar[tuple[str, ...] | str | None] = ContextVar("dropflow_asked", default=None)


@contextmanager
def questions(texts: Sequence[str]) -> Iterator[None]:
    """State the questions of the prompts that this thread runs inside the block, for stages with `reads_questions`.

    One for each sample, without chat template; where `generate` repeats samples, such as for beams, each applies to
    all copies of its sample. A thread started inside the block does not see them: open the block in that thread.
    Raises `TypeError` for anything but strings.
    """
    own: tuple[Any, ...] = (None,) if isinstance(texts, str) or not isinstance(texts, Iterable) else tuple(texts)
    if not all(isinstance(text, str) for text in own):
        got = "a single string" if isinstance(texts, str) else quoted(texts)
        raise TypeError(f"questions: expected one string per sample, such as ['What is this?'], got {got}")
    token = _asked.set(own)
    try:
        yield
    finally:
        _asked.reset(token)


@contextmanager
def question_of_every_sample(text: str) -> Iterator[None]:
    """State one question for every sample, whatever the prompts; for the conformance kit."""
    token = _asked.set(text)
    try:
        yield
    finally:
        _asked.reset(token)


def stated_questions_of(batch: int) -> tuple[str, ...]:
    """The questions that this thread states, of which each is for as many of `batch` samples as the others.

    Raises `UnsupportedCall` if none or a wrong number was stated.
    """
    asked = _asked.get()
    if isinstance(asked, str):
        return (asked,) * batch
    if not asked or batch % len(asked):
        stated = f"{len(asked)} stated" if asked else "none stated"
        raise UnsupportedCall(
            f"questions: {stated} for a batch of {batch}, but the policy has a stage that reads them as text; run the "
            "model inside `with dropflow.questions([...]):`, one string for each sample"
        )
    return asked
