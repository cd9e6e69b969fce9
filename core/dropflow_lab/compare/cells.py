"""Formats the numbers of a row for tables, on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from dropflow_lab.compare.cost import Cost
from dropflow_lab.compare.rows import Row
from dropflow_lab.measure.intervals import Gain, Share
from dropflow_lab.measure.timing import Spread

NONE = "-"
_ANSWER = 0.05
"""Smallest difference in visual tokens at which the average over the answer is shown next to that of the prefill."""


def average(row: Row, digits: int = 1) -> str:
    """Average tokens in the prefill, and over the answer where they differ."""
    shown = f"{row.average_visual_tokens:.{digits}f}"
    if abs(row.average_visual_tokens - row.average_visual_tokens_answer) < _ANSWER:
        return shown
    return f"{shown} ({row.average_visual_tokens_answer:.{digits}f} over the answer)"


def share(value: Share | None) -> str:
    """A share with its interval."""
    return NONE if value is None else f"{value.value:.1%} ({value.low:.1%} .. {value.high:.1%})"


def control(row: Row) -> str:
    """Accuracy (or agreement) of random pruning at equal average tokens."""
    return NONE if row.control is None else share(row.control.accuracy or row.control.agreement)


def gain(row: Row) -> str:
    """Gain of a policy over random pruning, or why it is not known."""
    return row.no_control or NONE if row.control is None else signed(row.control.gain)


def signed(value: Gain) -> str:
    """A difference with its interval and its verdict."""
    return f"{value.value:+z.1%} ({value.low:+z.1%} .. {value.high:+z.1%}) {value.verdict}"


def ratio(spread: Spread) -> str:
    """Median and quartiles."""
    return f"{spread.median:.2f} ({spread.low:.2f} .. {spread.high:.2f})"


def parts(cost: Cost) -> list[str]:
    """Vision, selection, rest of the prefill, decode, and their sum, rounded so that they still add up to it."""
    if cost.times is None:
        return [NONE] * 5
    split = cost.times.parts
    shown = _rounded([split.vision, split.selection, split.prefill, split.decode])
    return [f"{value / 10:.1f}%" for value in (*shown, sum(shown))]


def apart(row: Row, kinds: Sequence[str]) -> list[str]:
    """Accuracy of the kinds of questions that are shown separately."""
    return [f"{row.kinds[kind].value:.1%}" if kind in row.kinds else NONE for kind in kinds]


def _rounded(values: Sequence[float]) -> list[int]:
    """Thousandths that add up to the rounded sum: those with the largest remainders are rounded up."""
    exact = [value * 1000 for value in values]
    floors = [int(value) for value in exact]
    missing = round(sum(exact)) - sum(floors)
    up = sorted(range(len(exact)), key=lambda place: floors[place] - exact[place])[:missing]
    return [value + (place in up) for place, value in enumerate(floors)]
