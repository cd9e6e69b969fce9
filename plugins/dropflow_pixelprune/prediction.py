"""The maths of PixelPrune: which units of an image are the same, and which their neighbours predict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Metric = Literal["max", "mae", "rmse"]
Order = Literal["pred_2d", "serpentine", "raster"]
Same = Callable[[Tensor, Tensor], Tensor]
"""Whether units (..., width) are the same as others (..., width)."""


def alike(metric: Metric, threshold: float) -> Same:
    """Units are the same where their difference is at most `threshold`; with 0, where their numbers are equal.

    The difference is the largest absolute one of any number (`max`), the mean of all (`mae`), or the root of the mean
    square (`rmse`).
    """
    if threshold == 0:
        return lambda own, other: (own == other).all(-1)

    def near(own: Tensor, other: Tensor) -> Tensor:
        difference = own - other
        if metric == "max":
            return difference.abs().amax(-1) <= threshold
        size = difference.abs().mean(-1) if metric == "mae" else difference.square().mean(-1).sqrt()
        return size <= threshold

    return near


def kept(
    units: Float[Tensor, "units width"],
    grid: tuple[int, int],
    metric: Metric,
    threshold: float,
    order: Order,
    *,
    anchored: bool = True,
) -> Bool[Tensor, "units"]:
    """Which units of a `grid` (rows, columns) stay: the first, and all that are not the same as their prediction.

    `raster` predicts a unit by the one before it, row after row; `serpentine` likewise, with odd rows from right to
    left; `pred_2d` by the unit to the left, A, or the one above, B (see `_pred_2d`). With `anchored` a unit is compared
    with what takes the place of its neighbours, so that errors do not add up: a unit that stays is itself, one that
    goes is what predicted it; scans then take one step for each unit, and `pred_2d` one for each anti-diagonal.
    Without, and at threshold 0 where it is all the same, with the neighbours themselves, in parallel. Nothing is read
    back from the device.
    """
    same, (rows, columns) = alike(metric, threshold), grid
    step_by_step = anchored and threshold > 0
    if order == "pred_2d":
        own = units.view(rows, columns, -1)
        return (_pred_2d_anchored(own, same) if step_by_step else _pred_2d(own, same)).flatten()
    scan = torch.arange(len(units), device=units.device).view(rows, columns)
    if order == "serpentine":
        scan[1::2] = scan[1::2].flip(1)
    scanned = units[scan.flatten()]
    found = _scan_anchored(scanned, same) if step_by_step else ~_with_first(same(scanned[1:], scanned[:-1]))
    return torch.zeros_like(found).index_copy(0, scan.flatten(), found)


def _with_first(same: Bool[Tensor, "others"]) -> Bool[Tensor, "units"]:
    """For a first unit, which nothing predicts, and the others."""
    return torch.cat((same.new_zeros(1), same))


def _scan_anchored(units: Float[Tensor, "units width"], same: Same) -> Bool[Tensor, "units"]:
    """Units that are not the same as the last one that stays."""
    last, found = units[0], [torch.ones((), dtype=torch.bool, device=units.device)]
    for unit in units[1:]:
        found.append(~same(unit, last))
        last = torch.where(found[-1], unit, last)
    return torch.stack(found)


def _pred_2d(units: Float[Tensor, "rows columns width"], same: Same) -> Bool[Tensor, "rows columns"]:
    """Units that their neighbours do not predict.

    The first row is predicted by A and the first column by B. Others by B where the unit above and to the left, C, is
    the same as A and not as B, so that an edge runs along A and C; else by A.
    """
    rows, columns = units.shape[:2]
    left = torch.zeros(rows, columns, dtype=torch.bool, device=units.device)
    above = left.clone()
    left[:, 1:], above[1:] = same(units[:, 1:], units[:, :-1]), same(units[1:], units[:-1])
    by_above = torch.zeros_like(left)
    by_above[1:, 1:] = above[1:, :-1] & ~left[:-1, 1:]  # A is below C, and B to the right of it
    by_above[1:, 0] = True
    return ~torch.where(by_above, above, left)


def _pred_2d_anchored(units: Float[Tensor, "rows columns width"], same: Same) -> Bool[Tensor, "rows columns"]:
    """The same by what takes the neighbours' places, one anti-diagonal after the other."""
    (rows, columns), replaced = units.shape[:2], units.clone()
    found = torch.ones(rows, columns, dtype=torch.bool, device=units.device)
    for diagonal in range(1, rows + columns - 1):
        row = torch.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1), device=units.device)
        column = diagonal - row
        up, back = (row - 1).clamp(min=0), (column - 1).clamp(min=0)
        left, above, corner = replaced[row, back], replaced[up, column], replaced[up, back]
        by_above = (same(corner, left) & ~same(corner, above) & (row > 0)) | (column == 0)
        predicted = torch.where(by_above[:, None], above, left)
        own = units[row, column]
        found[row, column] = ~same(own, predicted)
        replaced[row, column] = torch.where(found[row, column][:, None], own, predicted)
    return found


def components(
    units: Float[Tensor, "units width"], grid: tuple[int, int], metric: Metric, threshold: float
) -> Int[Tensor, "units"]:
    """For each unit, the first unit of its component: what neighbours in four directions that are the same connect."""
    same, (rows, columns) = alike(metric, threshold), grid
    own = units.view(rows, columns, -1)
    roots = list(range(len(units)))

    def root(unit: int) -> int:
        while roots[unit] != unit:
            roots[unit] = unit = roots[roots[unit]]
        return unit

    across = same(own[:, 1:], own[:, :-1]).nonzero().tolist()
    down = same(own[1:], own[:-1]).nonzero().tolist()
    edges = [(r * columns + c, r * columns + c + 1) for r, c in across]
    for first, second in edges + [(r * columns + c, (r + 1) * columns + c) for r, c in down]:
        low, high = sorted((root(first), root(second)))
        roots[high] = low
    return torch.tensor([root(unit) for unit in range(len(units))], dtype=torch.long)


def spread(labels: Int[Tensor, "units"], skip: float) -> Bool[Tensor, "units"]:
    """Of each component of n units, n - round(n * skip) stay, halves to even, at least one, at even distances."""
    keep = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels):
        own = (labels == label).nonzero()[:, 0]
        count = max(1, len(own) - round(len(own) * skip))
        keep[own[torch.linspace(0, len(own) - 1, count).long()] if len(own) > 1 else own] = True
    return keep
