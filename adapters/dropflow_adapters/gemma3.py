"""Gemma 3: a SigLIP tower pooled to a fixed number of tokens, which attend to each other bidirectionally."""

from __future__ import annotations

from dropflow import Backbone, square_grid


class Gemma3(Backbone):
    """`Gemma3ForConditionalGeneration`; every image, or pan-and-scan crop, has the same number of tokens."""

    @property
    def tokens_per_image(self) -> int:
        """Tokens after pooling."""
        return int(self.model.config.mm_tokens_per_image)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of pooled patches."""
        return square_grid(tokens)
