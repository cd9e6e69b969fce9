"""The number of tokens that MustDrop reports for a prompt."""

from __future__ import annotations

from collections.abc import Sequence


def equal_token_number(visual_tokens: Sequence[float], images: int = 1) -> float:
    """MustDrop's "equal token number": visual tokens per layer and image, a layer counted *after* its own cut.

    `visual_tokens` are those before each of the L layers, all `images` together, such as
    `[layer.visual_tokens for layer in flow.report().layers]`. A layer whose attention decides is counted with the
    survivors although it ran on all, so that this lies below the average of tokens really processed.
    """
    after = [*visual_tokens[1:], visual_tokens[-1]]
    return sum(after) / (len(after) * images)
