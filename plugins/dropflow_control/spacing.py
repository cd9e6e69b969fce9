"""The maths of even distances, in a row and on a patch grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def spread(count: int, grid: tuple[int, int]) -> Bool[Tensor, "patches"]:
    """`count` patches (at most all) of a grid, in raster order, as evenly in both directions as whole numbers allow."""
    rows, columns = grid
    if not count:
        return torch.zeros(rows * columns, dtype=torch.bool)
    used = min(max(round(math.sqrt(count * rows / columns)), -(-count // columns)), rows, count)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for number, row in enumerate(evenly(torch.arange(rows), used, rows).nonzero()[:, 0]):
        here = count * (number + 1) // used - count * number // used
        mask[row] = evenly(torch.arange(columns), here, columns)
    return mask.flatten()


def divided(count: int, sizes: Sequence[int]) -> list[int]:
    """`count` things (at most all) divided evenly among groups of these `sizes`, in their order, as whole numbers."""
    ends = list(accumulate(sizes, initial=0))
    return (
        [count * end // ends[-1] - count * start // ends[-1] for start, end in pairwise(ends)] if ends[-1] else ends[1:]
    )


def evenly(rank: Int[Tensor, "..."], count: int | Tensor, size: int | Tensor) -> Bool[Tensor, "..."]:
    """Which of `size` things in a row, by their number from 0, are `count` (at most `size`) at even distances."""
    size = torch.as_tensor(size).clamp(min=1).to(rank.device)
    half = size // 2
    return (rank + 1) * count + half >= ((rank * count + half) // size + 1) * size
