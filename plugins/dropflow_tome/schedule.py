"""How many tokens are merged in each layer."""

from __future__ import annotations

from collections.abc import Sequence


def schedule(layers: int, tokens: int | Sequence[int], slope: float = 0.0) -> list[int]:
    """Tokens to merge in each of `layers` layers: the same in all, or as listed, padded with 0.

    `slope` tilts a single number: from 2 * tokens in the first layer down to 0 at -1, from 0 up to 2 * tokens at 1.
    """
    if not isinstance(tokens, int):
        return [*tokens, *[0] * (layers - len(tokens))]
    low = int(tokens * (1 - slope))
    step = 2 * (tokens - low) / max(layers - 1, 1)
    return [int(low + step * layer) for layer in range(layers)]
