"""The maths of average pooling over windows of the patch grid."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def pool(
    features: Float[Tensor, "patches dim"], grid: tuple[int, int], window: tuple[int, int]
) -> tuple[Float[Tensor, "windows dim"], Int[Tensor, "windows"]]:
    """Mean of each window of the grid in raster order, and the raster index of the patch in its middle.

    A window larger than the grid is the whole of it.
    """
    window = min(window[0], grid[0]), min(window[1], grid[1])
    maps = features.T.reshape(1, -1, *grid)
    means = torch.nn.functional.avg_pool2d(maps, window, ceil_mode=True, count_include_pad=False)
    rows, columns = (_middles(size, step).to(features.device) for size, step in zip(grid, window, strict=True))
    return means.flatten(2)[0].T, (rows[:, None] * grid[1] + columns).flatten()


def _middles(size: int, step: int) -> Int[Tensor, "windows"]:
    first = torch.arange(0, size, step)
    last = (first + step).clamp(max=size) - 1
    return (first + last) // 2
