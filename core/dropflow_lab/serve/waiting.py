"""A request that waits for the model or is being answered, and what it is told meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from dropflow_lab.serve.api_error import ApiError
from dropflow_lab.serve.prompt import Prompt


@dataclass(frozen=True)
class Piece:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The end of the answer."""

    reason: Literal["stop", "length"]
    tokens: int
    """Tokens of the answer, with the end token."""


Told = Piece | Finished | ApiError


@dataclass(frozen=True)
class Choice:
    """How the tokens of one answer are chosen, and when it ends."""

    tokens: int
    """Tokens of the answer at most."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends."""


@dataclass(eq=False)
class Waiting:
    """One request, from the moment that its prompt is prepared."""

    prompt: Prompt
    policy: str
    choice: Choice
    hand_on: Callable[[Told], None]
    """Hands on what happens; called in any thread, and must not block."""
    beginning: str | None = None
    """Stands for its policy, pictures and the text before them (see `Reuse.digest`); `None` if it shares nothing."""
    arrived: float = field(default_factory=time.monotonic)
    """Reading of `time.monotonic` when it was put in line."""
    cancelled: bool = False
    """Whether nobody wants the answer any more; set by any thread."""
    begun: bool = False
    """Whether it has been told anything."""
    over: bool = False
    """Whether it has been told how it ended."""

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must be equal in the requests of one batch: policy, and kinds and sizes of inputs."""
        return self.policy, self.prompt.shape

    def tell(self, told: Told) -> None:
        """Hand on what happens; nothing after the end."""
        if not self.over:
            self.begun = True
            self.over = not isinstance(told, Piece)
            self.hand_on(told)
