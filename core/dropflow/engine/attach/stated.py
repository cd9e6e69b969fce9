"""What callers state for their thread's calls: which tokens are visual or ask, the questions, which policy to use."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from jaxtyping import Bool
from torch import Tensor

from dropflow.errors import UnsupportedCall
from dropflow.lifecycle.instruction import stated_instruction
from dropflow.lifecycle.questions import stated_questions_of

T = TypeVar("T")


class Stated(Generic[T]):
    """A value per owner that applies to one thread inside a block; blocks may be nested.

    The value applies only as long as its block object exists, so a block whose exit was interrupted no longer applies.
    """

    def __init__(self, name: str) -> None:
        self._blocks: ContextVar[tuple[weakref.ref[_Block[T]], ...]] = ContextVar(name, default=())
        self.innermost: ContextVar[weakref.ref[_Block[T]]] = ContextVar(f"{name}_innermost")
        """The last of a thread's blocks, unset outside blocks; for compiled code, which cannot search them."""

    @contextmanager
    def let(self, owner: object, value: T) -> Iterator[None]:
        """State `value` for `owner`; the value stated before applies again afterwards."""
        block = _Block(owner, value)
        around = (each for each in self._blocks.get() if each() is not None)
        blocks, innermost = self._blocks.set((*around, weakref.ref(block))), self.innermost.set(weakref.ref(block))
        try:
            yield
        finally:
            with suppress(ValueError):  # ended in another thread, for example by the garbage collector
                self._blocks.reset(blocks)
                self.innermost.reset(innermost)

    def of(self, owner: object, default: T) -> T:
        """The value that this thread states for `owner`."""
        for each in reversed(self._blocks.get()):
            block = each()
            if block is not None and block.owner is owner:
                return block.value
        return default


class _Block(Generic[T]):
    """A block that states a value; only the block's frame holds a reference to it."""

    def __init__(self, owner: object, value: T) -> None:
        self.owner, self.value = owner, value


def stated_tokens(
    visual: Bool[Tensor, "batch tokens"], given: Tensor, *, continues: bool
) -> Bool[Tensor, "batch tokens"] | None:
    """The visual tokens a caller stated, for each row of a call; `None` in later steps of the prompt.

    `given` are the call's ids or embeddings. Refuses a mask that does not fit the call.
    """
    batch, tokens = given.shape[:2]
    if visual.shape[1] == tokens and (copies := _copies(visual, given)):
        return visual.repeat_interleave(copies, 0)
    if continues:
        return None
    raise UnsupportedCall(
        f"visual: stated for {tuple(visual.shape)} (batch, tokens), but this call has {(batch, tokens)}; state the "
        "tokens of the whole prompt, and keep `use_cache` on in `generate`"
    )


def stated_instruction_tokens(embeds: Tensor, seen: int) -> Bool[Tensor, "batch tokens"] | None:
    """The instruction tokens a caller stated, for each row of a call; `None` if none were stated.

    `embeds` (batch, tokens, dim) are those of the call, before which its cache has `seen` tokens. Refuses a mask that
    does not fit the call.
    """
    stated, tokens = stated_instruction(), embeds.shape[1]
    if stated is None:
        return None
    first = 0 if stated.shape[1] == tokens else seen
    if stated.shape[1] >= first + tokens and (copies := _copies(stated, embeds)):
        return stated[:, first : first + tokens].repeat_interleave(copies, 0)
    raise UnsupportedCall(
        f"instruction_tokens: stated for {tuple(stated.shape)} (batch, tokens), but this call has "
        f"{tuple(embeds.shape[:2])} after {seen} tokens; state one row for each sample, and a column for each token"
    )


def stated_questions(embeds: Tensor) -> tuple[str, ...]:
    """The question a caller stated for each row of `embeds`; refuses a number of questions that does not fit them."""
    asked = stated_questions_of(len(embeds))
    copies = _copies(asked, embeds)
    if not copies:
        raise UnsupportedCall(
            f"questions: {len(asked)} stated for a batch of {len(embeds)} different prompts; state one for each sample"
        )
    return tuple(question for question in asked for _ in range(copies))


def _copies(stated: Sequence[Any] | Tensor, given: Tensor) -> int:
    """How many rows of a call each stated row is for: more than one only if these are copies; 0 if they do not fit."""
    batch, rows = len(given), len(stated)
    if not rows or batch % rows:
        return 0
    copies = batch // rows
    own = given.reshape(rows, copies, *given.shape[1:])
    return copies if copies == 1 or bool((own == own[:, :1]).all()) else 0
