"""How many tokens the released code of DART keeps: the image's pivots, and as many tokens for each pivot."""

from __future__ import annotations

from dataclasses import dataclass, field

from dropflow import Budget


@dataclass(frozen=True)
class ReleasedBudget(Budget):
    """What a number of tokens becomes: the same number for each pivot, rounded down, beside the image's own pivots."""

    asked: Budget = field(default_factory=Budget)
    """The number, or the share, that the policy asks for."""
    image_pivots: int = 0
    """Pivots among the tokens of the image."""
    text_pivots: int = 0
    """Pivots among the text after it."""

    def of(self, visual_tokens: int) -> int:
        """Tokens that stay of an image with `visual_tokens` tokens at entry: all of them where all are asked for."""
        share, pivots = self.asked.share, self.image_pivots + self.text_pivots
        count = self.asked.of(visual_tokens) if share is None else int(share * visual_tokens)
        if count >= visual_tokens:
            return visual_tokens
        return min(self.image_pivots + count // pivots * pivots, visual_tokens)
