"""The rule that turns measured curves into a policy's boundaries and keeps: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dropflow.lifecycle.stage import Window
from dropflow.operators import first_keep
from dropflow.policy.schedule import schedule
from dropflow.units import Budget
from dropflow_lab.errors import InputError

FULL_SHARE = 0.75
"""Largest share of the budget that may go to layers before the first pruning, where every visual token is live."""


@dataclass(frozen=True)
class Knobs:
    """User settings for the policy to be made."""

    fewer: float = 0.75
    """Share of the visual tokens to save, on average over all layers: above 0, below 1."""
    average_tokens: float | None = None
    """The same as visual tokens per layer; takes precedence over `fewer`."""
    exit_loss: float = 0.02
    """Accuracy (or agreement) that an exit may cost, 0..1."""
    prunes: int = 4
    """Maximum number of boundaries to prune at."""
    entry: int | None = None
    """Entry boundary, instead of the rule's."""
    exit: int | None = None
    """Exit boundary, instead of the rule's."""

    def average(self, visual_tokens: int) -> float:
        """Return the target number of visual tokens per layer."""
        return (1 - self.fewer) * visual_tokens if self.average_tokens is None else self.average_tokens

    def check(self, layers: int) -> None:
        """Raise `InputError` for a share that saves nothing or all, or a boundary that the model does not have."""
        if not 0 < self.fewer < 1:
            raise InputError(f"--fewer: expected a share above 0 and below 1, got {self.fewer:g}")
        for name, boundary, low, high in (("--entry", self.entry, 0, layers - 1), ("--exit", self.exit, 1, layers)):
            if boundary is not None and not low <= boundary <= high:
                raise InputError(f"{name}: expected a boundary from {low} to {high} ({layers} layers), got {boundary}")


@dataclass(frozen=True)
class Choice:
    """What the rule chose."""

    entry: int
    exit: int
    keep: dict[int, int]
    """Boundary -> visual tokens kept, of an image of `visual_tokens`."""
    average_visual_tokens: float
    """Per layer, over all layers, by this schedule."""


def choose_exit(dense: float, scores: Sequence[float], loss: float) -> int:
    """Return the first boundary from which on every exit costs at most `loss`.

    `scores[x]` is the quality when no vision is live from boundary x on, `dense` that without a policy (HiDrop's
    "deep-to-shallow masking"). The result is L, the number of scores, if even an exit before the last layer costs more.
    """
    exit_at = len(scores)
    while exit_at > 0 and scores[exit_at - 1] >= dense - loss - 1e-9:
        exit_at -= 1
    return exit_at


def choose_entry(visual: Sequence[float], exit_at: int) -> int:
    """Return the lowest local minimum of the visual curve in the first half of the depth; 0 where there is none.

    `visual[i]` is the intra-modal similarity of visual tokens across layer i, for i = 0..L-2. HiDrop reads such a
    minimum as the onset of fusion. The result is below `exit_at`.
    """
    half = (len(visual) + 1) // 2
    found = [i for i in _local_minima(visual) if i <= half and i < exit_at]
    return min(found, key=lambda i: visual[i], default=0)


def choose_prunes(ilvas: Sequence[float], window: Window, most: int, latest_first: int) -> list[int]:
    """Return at most `most` boundaries inside the window: the highest local maxima of ILVAS, in order.

    `ilvas[l]` is the mean over all distances n of ILVAS(l, l+n). The first boundary lies after the entry and no later
    than `latest_first`, so that the budget is not spent before it. If no maximum lies there, the boundary with the
    highest value there is added, if possible at least two layers from each maximum; it replaces adjacent maxima, or
    else the lowest one beyond `most`.
    """
    inside = range(window.entry + 1, min(window.exit, len(ilvas)))
    if not inside:
        return []
    highest_first = sorted(_local_minima([-value for value in ilvas]), key=lambda i: -ilvas[i])
    maxima = [i for i in highest_first if i in inside]
    early = [i for i in inside if i <= latest_first]
    chosen = maxima[:most]
    if any(i in early for i in chosen):
        return sorted(chosen)
    free = [i for i in early if all(abs(i - other) > 1 for other in chosen)]
    first = max(free or early, key=lambda i: ilvas[i])
    return sorted([first, *[i for i in chosen if abs(i - first) > 1][: most - 1]])


def choose_keeps(
    average: float, layers: int, visual_tokens: int, window: Window, prunes: Sequence[int]
) -> dict[int, int]:
    """Return keeps that shrink by the same factor at every boundary and meet the average: a concave pyramid.

    keep_j = N * ratio^j, rounded, at least 1, with the ratio solved by bisection; the first is then solved exactly
    (`dropflow.schedule.first_keep`). There are no keeps if the window alone needs no more than the average. Raises
    `ValueError` giving the averages that can be reached.
    """
    if visual_tokens * (window.exit - window.entry) <= average * layers:
        return {}
    if not prunes:
        raise ValueError(f"there is no boundary after {window.entry} and before {window.exit} to prune at")
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if average_of(layers, visual_tokens, window, _pyramid(visual_tokens, middle, prunes)) > average:
            high = middle
        else:
            low = middle
    keeps = _pyramid(visual_tokens, low, prunes)
    return keeps | {prunes[0]: first_keep(average, layers, visual_tokens, window, keeps)}


def average_of(layers: int, visual_tokens: int, window: Window, keeps: Mapping[int, int]) -> float:
    """Return the visual tokens per layer, averaged over all layers."""
    budgets = {boundary: [Budget(tokens=count)] for boundary, count in keeps.items()}
    return schedule(layers, visual_tokens, window, budgets).average or 0.0


def latest_first_prune(average: float, layers: int, visual_tokens: int, entry: int) -> int:
    """Return the latest first pruning boundary for which full layers take at most `FULL_SHARE` of the budget."""
    return entry + max(1, math.floor(FULL_SHARE * average * layers / visual_tokens))


def choose(
    visual: Sequence[float],
    ilvas: Sequence[float],
    dense: float,
    exits: Sequence[float],
    visual_tokens: int,
    knobs: Knobs,
) -> Choice:
    """Apply the whole rule to the curves, as the functions above take them.

    Raises `InputError` naming the reachable averages if these boundaries cannot meet the target.
    """
    layers = len(exits)
    average = knobs.average(visual_tokens)
    last = choose_exit(dense, exits, knobs.exit_loss) if knobs.exit is None else knobs.exit
    first = choose_entry(visual, last) if knobs.entry is None else knobs.entry
    if not first < last:
        raise InputError(f"vision would enter at boundary {first} and be gone from {last} on; give --entry or --exit")
    window = Window(first, last)
    prunes = choose_prunes(ilvas, window, knobs.prunes, latest_first_prune(average, layers, visual_tokens, first))
    try:
        keep = choose_keeps(average, layers, visual_tokens, window, prunes)
    except ValueError as error:
        raise InputError(
            f"an average of {average:g} tokens cannot be met with vision in layers {first} to {last - 1}: {error}; "
            "give another --average-tokens, --entry or --exit, or drop tokens by an encode stage too"
        ) from None
    return Choice(first, last, keep, average_of(layers, visual_tokens, window, keep))


def _pyramid(visual_tokens: int, ratio: float, prunes: Sequence[int]) -> dict[int, int]:
    return {at: max(1, round(visual_tokens * ratio**step)) for step, at in enumerate(prunes, 1)}


def _local_minima(curve: Sequence[float]) -> list[int]:
    """Inner points below their left neighbour and not above the right one."""
    falls = [left > right for left, right in pairwise(curve)]
    return [i for i in range(1, len(curve) - 1) if falls[i - 1] and not falls[i]]
