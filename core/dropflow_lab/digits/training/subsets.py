"""Chooses the visual tokens that a training batch keeps, so that the model learns to cope with missing ones.

There are three ways of choosing, so that no family of pruning policies is favoured: digits first, at random, and a
contiguous run.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from dropflow_lab.digits.data.scenes import PATCHES

Way = Literal["digits-first", "random", "contiguous"]
WAYS: tuple[Way, ...] = ("digits-first", "random", "contiguous")


def draw_subset(
    owner: Int[Tensor, "batch 144"], keep: int, way: Way, rng: np.random.Generator
) -> Int[Tensor, "batch keep"]:
    """Draw `keep` patches per picture, 1..144, in ascending order.

    `digits-first` takes patches of digits before background, in random order within each; `contiguous` takes
    a run in reading order that wraps around.
    """
    rows = owner.shape[0]
    if way == "contiguous":
        start = torch.from_numpy(rng.integers(0, PATCHES, size=(rows, 1)))
        kept = (start + torch.arange(keep)) % PATCHES
    else:
        rank = torch.from_numpy(rng.random((rows, PATCHES)))
        if way == "digits-first":
            rank = rank + (owner < 0)
        kept = rank.argsort(1)[:, :keep]
    return kept.sort(1).values
