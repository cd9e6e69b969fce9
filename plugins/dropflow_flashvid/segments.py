"""The maths of FlashVID's budgets: the segments of a video, and how many tokens of a frame stay or are merged."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

EXPANSION = 1.25
"""How many more tokens than the retention says enter the LLM, to be given back inside it."""


def segments(means: Float[Tensor, "frames dim"], threshold: float, fewest: int) -> list[tuple[int, int]]:
    """First frame of each segment and the first one after it.

    A cut is where the cosine of the means of two frames is below `threshold`; where that gives fewer than `fewest`
    segments, cuts at the least alike of the other frames make up for it, as far as there are any.
    """
    unit = torch.nn.functional.normalize(means.float(), dim=1, eps=1e-12)
    alike = (unit[1:] * unit[:-1]).sum(1).tolist()
    cuts = {step for step, cosine in enumerate(alike) if cosine < threshold}
    others = sorted((step for step in range(len(alike)) if step not in cuts), key=lambda step: alike[step])
    cuts |= set(others[: max(0, fewest - len(cuts) - 1)])
    return list(pairwise([0, *(cut + 1 for cut in sorted(cuts)), len(means)]))


def budgets(rows: int, retention: float, alpha: float) -> tuple[int, int]:
    """Tokens of a frame of so many rows that stay as they are, and that sum up others.

    In doubles, in the published order.
    """
    most = min(rows, math.ceil(rows * retention * EXPANSION))
    selected = math.ceil(most * alpha)
    return selected, most - selected
