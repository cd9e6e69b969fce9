"""Features that are still being encoded while the layers before vision enters run, and what they bring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from dropflow.engine.tokens.prompt import Prompt


@dataclass(frozen=True, eq=False)
class Arrival:
    """What is known of a prompt once its features have been encoded."""

    prompt: Prompt
    embeds: Float[Tensor, "batch tokens dim"]
    """The input embeddings of the decoder, with the features in their places."""
    residuals: tuple[tuple[Tensor, Tensor], ...]
    """What the model adds after its first layers, as in `Backbone.deepstack_residuals`."""


class Awaited:
    """The arrival of a call's features; the first to ask for it waits for them."""

    def __init__(self, arrive: Callable[[], Arrival]) -> None:
        """`arrive` waits; it raises what went wrong while encoding."""
        self._arrive = arrive
        self._arrival: Arrival | None = None

    @property
    def arrived(self) -> bool:
        """Whether somebody has asked, so that nothing is left to wait for."""
        return self._arrival is not None

    def get(self) -> Arrival:
        """The arrival; waits for it the first time."""
        if self._arrival is None:
            self._arrival = self._arrive()
        return self._arrival
