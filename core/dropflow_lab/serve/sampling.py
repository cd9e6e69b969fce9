"""Draws the tokens of every row by itself, so that an answer does not depend on what it is batched with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dropflow_lab.serve.waiting import Choice

_COLDEST = 1e-6
"""Least temperature that logits are divided by, far from where float32 overflows; all chance is on the likeliest."""


class Sampler:
    """A logits processor that draws a token for each row with a temperature, and leaves only that one to choose.

    Each row has a random generator of its own. Rows without a temperature stay as they are, so that a greedy search
    after this processor serves all of them.
    """

    def __init__(self, choices: Sequence[Choice]) -> None:
        """`choices` are those of the rows of a batch, in order."""
        self._choices = tuple(choices)
        self._generators = [_generator(choice.seed) for choice in choices]

    def __call__(
        self, input_ids: Int[Tensor, "batch tokens"], scores: Float[Tensor, "batch vocabulary"]
    ) -> Float[Tensor, "batch vocabulary"]:
        """Return the scores, -inf for every token of a sampled row but the drawn one."""
        del input_ids
        scores = scores.clone()
        for row, (choice, generator) in enumerate(zip(self._choices, self._generators, strict=True)):
            if choice.temperature > 0:
                drawn = draw(scores[row], choice.temperature, choice.top_p, generator)
                scores[row] = -torch.inf
                scores[row, drawn] = 0
        return scores


def draw(logits: Float[Tensor, " vocabulary"], temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Return a token drawn from the fewest likeliest ones that hold at least `top_p` of the probability."""
    chances = (logits.float().cpu() / max(temperature, _COLDEST)).softmax(-1)
    sorted_chances, tokens = chances.sort(descending=True, stable=True)
    sorted_chances[1:][(sorted_chances.cumsum(-1) - sorted_chances)[1:] >= top_p] = 0
    return int(tokens[torch.multinomial(sorted_chances, 1, generator=generator)])


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
