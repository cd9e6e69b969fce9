"""How many tokens of an image survive: what is left of it, and the forecast after every boundary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dropflow import Budget, Forecast, PruneCall


def recycled(dropped: int, share: float = 0.3, cluster_size: int = 10) -> tuple[int, int]:
    """Of `dropped` tokens, how many are recycled, and into how many clusters; (0, 0) where none was dropped."""
    if not dropped:
        return 0, 0
    count = min(int(share * dropped) + 1, dropped)
    return count, min(int(count / cluster_size) + 1, count)


@dataclass(frozen=True)
class Survivors(Budget):
    """What is left of an image after the last of several boundaries: survivors, and a token for every cluster."""

    steps: tuple[Budget, ...] = ()
    """Survivors at each boundary up to this one."""
    recycle: tuple[float, int] | None = None
    """Share that is recycled and tokens of a cluster; `None` where nothing is."""
    at_least_one_goes: bool = False

    def of(self, visual_tokens: int) -> int:
        """Tokens that stay of an image with `visual_tokens` tokens at entry."""
        left = count = visual_tokens
        for step in self.steps:
            kept = step.tokens if step.tokens is not None else step.of(visual_tokens)
            if self.at_least_one_goes:
                kept = min(kept, left - 1)
            made = recycled(max(left - kept, 0), *self.recycle)[1] if self.recycle else 0
            count = kept + made
            left = min(left, count)
        return count


def forecast(
    keeps: Mapping[int, Budget | None], *, recycle: tuple[float, int] | None = None, at_least_one_goes: bool = False
) -> Forecast:
    """Survivors and clusters after each boundary of `keeps`, ascending; `None` from where the data decides."""
    steps, found = list(keeps.values()), {}
    for number, boundary in enumerate(keeps, 1):
        known = tuple(budget for budget in steps[:number] if budget is not None)
        whole = Survivors(steps=known, recycle=recycle, at_least_one_goes=at_least_one_goes)
        found[boundary] = whole if len(known) == number else None
    return Forecast(keeps=found)


def images_left(call: PruneCall) -> list[tuple[int, int]]:
    """Of every image, by number, the sample that it belongs to and its live tokens there."""
    found = []
    for image in range(len(call.image_sizes)):
        own = call.image_id == image
        sample = int(own.any(1).long().argmax())
        found.append((sample, int(own[sample].sum())))
    return found
