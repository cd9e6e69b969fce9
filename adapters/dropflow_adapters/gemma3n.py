"""Gemma 3n: a MobileNet tower, several streams of states between layers, and last layers that share keys."""

from __future__ import annotations

from torch import Tensor

from dropflow import Backbone, square_grid


class Gemma3n(Backbone):
    """`Gemma3nForConditionalGeneration`; every image has the same number of tokens. Audio tokens count as text."""

    @property
    def tokens_per_image(self) -> int:
        """Rows of the tower's last feature map."""
        return int(self.model.config.vision_soft_tokens_per_image)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of the tower's last feature map."""
        return square_grid(tokens)

    def seen_states(self, hidden: Tensor) -> Tensor:
        """The stream that attention and feed-forward parts work on, of (streams, batch, tokens, dim)."""
        return hidden[self.text.config.altup_active_idx]

    @property
    def final_norm(self) -> None:
        """None: it applies to the mean of all streams, projected, not to the one that stages see."""
        return None
