"""Gemma 3: a SigLIP tower pooled to a fixed number of tokens, which see each other in both directions."""

from __future__ import annotations

from dropflow import Backbone, square_grid


class Gemma3(Backbone):
    """`Gemma3ForConditionalGeneration`; every image (a crop of pan-and-scan is one) has the same number of tokens."""

    @property
    def tokens_per_image(self) -> int:
        """Tokens after the pooling."""
        return int(self.model.config.mm_tokens_per_image)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of pooled patches."""
        return square_grid(tokens)
