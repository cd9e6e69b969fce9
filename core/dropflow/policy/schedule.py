"""Visual tokens per decoder layer, as far as a policy's forecast tells, and their average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dropflow.lifecycle.stage import Forecast, Window
from dropflow.units import Budget


@dataclass(frozen=True)
class Schedule:
    """Visual tokens of one image before every decoder layer; `None` where the data decides."""

    per_layer: tuple[int | None, ...]
    entry: int | None
    """Visual tokens handed to the LLM, after the encode stages and before any layer."""
    tower: int | None
    """Visual tokens whose patches enter the vision tower, after the encode stages on pixels."""

    @property
    def average(self) -> float | None:
        """Mean over all L layers, text-only layers included; `None` if the data decides at any layer."""
        known = [count for count in self.per_layer if count is not None]
        return sum(known) / len(known) if len(known) == len(self.per_layer) else None


def schedule(
    layers: int,
    visual_tokens: int,
    window: Window,
    keeps: Mapping[int, Sequence[Budget | None]],
    encodes: Sequence[Forecast] = (),
    on_pixels: Sequence[Forecast] = (),
) -> Schedule:
    """Follow one image of `visual_tokens` tokens through the layers.

    `encodes` are the forecasts of encode stages in the order they act, `on_pixels` those of them before the tower.
    `keeps[i]` are the budgets applied at boundary i; a budget that is a share is relative to the tokens at entry, and
    protected tokens stay. Where several stages drop tokens at one boundary, the data decides, since only what all of
    them keep stays.
    """
    entry, protected = encoded(visual_tokens, encodes)
    current = entry
    counts: list[int | None] = []
    for layer in range(layers):
        inside = window.entry <= layer < window.exit
        if inside and keeps.get(layer):
            current = _left(current, entry, protected, keeps[layer])
        counts.append(current if inside else 0)
    return Schedule(tuple(counts), entry, encoded(visual_tokens, on_pixels)[0])


def _left(current: int | None, entry: int | None, protected: int, budgets: Sequence[Budget | None]) -> int | None:
    """Tokens after a boundary; `None` where the data decides."""
    if current is None or entry is None or any(budget is None for budget in budgets):
        return None
    dropping = [count for budget in budgets if budget is not None and (count := budget.of(entry)) < current]
    if len(dropping) > 1 and min(dropping) > 0:
        return None
    return max(min(dropping, default=current), min(current, protected))


def encoded(
    visual_tokens: int, encodes: Sequence[Forecast], grid: tuple[int, int] | None = None
) -> tuple[int | None, int]:
    """Visual tokens of an image that reach the LLM, and how many of them are protected; `grid` is its patch grid.

    `None` and 0 where the data decides. It does where a stage drops rows after another has protected some, since how
    many of the protected rows it would have kept anyway is unknown.
    """
    count: int | None = visual_tokens
    protected = 0
    for forecast in encodes:
        if forecast.encoded == "data":
            whole = grid is not None and count == grid[0] * grid[1]
            count = forecast.by_grid(grid) if forecast.by_grid and grid and whole else None
        if count is None:
            return None, 0
        if isinstance(forecast.encoded, Budget):
            left = forecast.encoded.of(count)
            if protected and left < count:
                return None, 0
            count = left
        if forecast.protected is not None:
            protected = max(protected, forecast.protected.of(count))
    return count, protected
