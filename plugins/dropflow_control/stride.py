"""Uniform pruning: as many visual tokens as a method keeps, at even distances."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow import PruneCall
from dropflow_control.subset import Subset, SubsetOptions


class Stride(Subset[SubsetOptions]):
    """Tokens at even distances stay.

    With `encode` they are evenly spread over the rows and columns of the patch grid, where the image has all of it: a
    quarter of 24 x 24 patches is every second one of every second row. With `keep`, and for images without a grid, they
    are every n-th of the tokens that are left, in their order.
    """

    Options = SubsetOptions
    summary = "a control: tokens at even distances stay"
    example: ClassVar[Mapping[str, Any]] = {"keep": {0.35: 0.5, 0.7: 0.2}}

    def rank(self, call: PruneCall, counts: list[int]) -> Float[Tensor, "batch slots"]:
        """1 for the chosen tokens, 0 for all others."""
        chosen = torch.zeros_like(call.protected)
        for image, count in enumerate(counts):
            own = call.image_id == image
            free = own & ~call.protected
            size, held = free.sum(1, keepdim=True), (own & call.protected).sum(1, keepdim=True)
            chosen |= free & evenly(free.cumsum(1) - 1, (count - held).clamp(min=0), size)
        return chosen.float()

    def rows(
        self, features: Float[Tensor, "rows dim"], count: int, grid: tuple[int, int] | None
    ) -> Bool[Tensor, "rows"]:
        """Rows spread over the grid, or in their order."""
        return spread(count, grid or (1, len(features)))


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


def evenly(rank: Int[Tensor, "..."], count: int | Tensor, size: int | Tensor) -> Bool[Tensor, "..."]:
    """Which of `size` things in a row, by their number from 0, are `count` (at most `size`) at even distances."""
    size = torch.as_tensor(size).clamp(min=1).to(rank.device)
    half = size // 2
    return (rank + 1) * count + half >= ((rank * count + half) // size + 1) * size
