"""Pure functions of token numbers: a budget divided among images, and a first keep solved from an average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from dropflow.lifecycle.stage import Window


def divide(total: int, sizes: Sequence[int]) -> list[int]:
    """Divide `total` tokens among images of these sizes in proportion, by largest remainder, ties to the first.

    No image gets more than it has: a total beyond all tokens gives every image its size.
    """
    every = sum(sizes)
    if total >= every:
        return list(sizes)
    parts = [total * size // every for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda image: (-(total * sizes[image] % every), image))
    for image in by_remainder[: total - sum(parts)]:
        parts[image] += 1
    return parts


def first_keep(average: float, layers: int, visual_tokens: int, window: Window, keeps: Mapping[int, int | None]) -> int:
    """Solve the first keep of a pyramid from a budget of average visual tokens over all layers (rounded up).

    `keeps` maps boundaries to counts, the first one being the unknown (HiDrop, arXiv:2602.23699, section 3.2: the tail
    is fixed and the first keep follows from the budget). Raises `ValueError` when no count from the second keep to
    `visual_tokens` reaches the average, or vision takes no part after the first boundary.
    """
    boundaries = [*sorted(keeps), window.exit]
    if not window.entry <= boundaries[0] < min(boundaries[1], window.exit):
        raise ValueError(
            f"no layer with vision follows the first boundary, {boundaries[0]}: vision takes part in layers "
            f"{window.entry} to {window.exit - 1}"
        )
    before = visual_tokens * (boundaries[0] - window.entry)
    tail = sum((keeps[b] or 0) * (end - b) for b, end in pairwise(boundaries[1:]))
    span = boundaries[1] - boundaries[0]
    exact = (average * layers - before - tail) / span
    solved = -int(-(exact - 1e-9) // 1)
    floor = (keeps[boundaries[1]] or 0) if len(keeps) > 1 else 0
    if not floor <= solved <= visual_tokens:
        low, high = ((before + tail + k * span) / layers for k in (floor, visual_tokens))
        raise ValueError(
            f"an average of {average:g} visual tokens needs a first keep of {solved}, not in {floor}..{visual_tokens}; "
            f"with these boundaries the average can be {low:.2f} to {high:.2f}"
        )
    return solved
