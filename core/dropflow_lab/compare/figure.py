"""Draws accuracy against visual tokens, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dropflow_lab.compare.rows import Row
from dropflow_lab.errors import InputError
from dropflow_lab.files import replacing

_METHOD, _CONTROL = "#0072B2", "#E69F00"  # Okabe and Ito's palette, safe for colour-blind readers
_FEW = 20
"""Largest number of rows in a panel for which all are labelled."""


def require_matplotlib() -> None:
    """Raise `InputError` if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("figures need matplotlib: pip install 'dropflow[figures]'") from None


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (cost, value) that no other point dominates, in order of cost.

    A point dominates another if it costs no more and is worth no less; of equal points, the first is on the front.
    """
    order = sorted(range(len(points)), key=lambda place: (points[place][0], -points[place][1], place))
    front: list[int] = []
    for place in order:
        if not front or points[place][1] > points[front[-1]][1]:
            front.append(place)
    return front


def draw(rows: Sequence[Row], folder: Path, name: str = "compare") -> list[Path]:
    """Draw every policy with its interval, its control and the Pareto front; return the paths of the PNG and the SVG.

    There is one panel per model. It shows accuracy if answers are known, otherwise agreement with the model without a
    policy. All policies are labelled if they are few, otherwise those on the front. Raises `InputError` without
    matplotlib.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row.title.model for row in rows))
    figure = Figure(figsize=(9, 6 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(models), squeeze=False)[:, 0]
    for axes, model in zip(panels, models, strict=True):
        _panel(axes, [row for row in rows if row.title.model == model])
        axes.set_title(model)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        with replacing(path) as part:
            figure.savefig(part, dpi=120)
    return paths


def _panel(axes: Any, rows: Sequence[Row]) -> None:
    known = all(row.accuracy is not None for row in rows)
    values = [row.accuracy if known and row.accuracy is not None else row.agreement for row in rows]
    points = [(row.average_visual_tokens_answer, value.value) for row, value in zip(rows, values, strict=True)]
    front = pareto_front(points)
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        where, height = points[place]
        axes.plot([where, where], [value.low, value.high], color=_METHOD, alpha=0.5, linewidth=1)
        axes.plot(where, height, "o", color=_METHOD, fillstyle="none" if row.title.persistent else "full")
        if place in front or len(rows) <= _FEW:
            label = str(replace(row.title, model="", rescaled=False))
            axes.annotate(label, points[place], xytext=(4, 4), textcoords="offset points", fontsize=7)
        if row.control is not None:
            control = row.control.accuracy if known else row.control.agreement
            if control is not None:
                axes.plot(row.control.average_visual_tokens, control.value, "x", color=_CONTROL)
    steps = [points[place] for place in front]
    axes.step(*zip(*steps, strict=True), where="post", color=_METHOD, linestyle="--", linewidth=1)
    axes.plot([], [], "o--", color=_METHOD, label="policies and their Pareto front")
    if any(row.title.persistent for row in rows):
        axes.plot([], [], "o", color=_METHOD, fillstyle="none", label="with persistent positions")
    axes.plot([], [], "x", color=_CONTROL, label="random pruning at the same average")
    axes.set_xlabel("visual tokens, average over layers")
    axes.set_ylabel("accuracy" if known else "agreement with the model without a policy")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
