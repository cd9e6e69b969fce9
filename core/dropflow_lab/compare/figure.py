"""Accuracy against visual tokens, with the Pareto front, as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dropflow_lab.compare.rows import Row
from dropflow_lab.errors import InputError
from dropflow_lab.files import replacing

_METHOD, _CONTROL = "#0072B2", "#E69F00"  # Okabe and Ito's palette, told apart by colour-blind people


def require_matplotlib() -> None:
    """Raise `InputError` where figures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("figures need matplotlib: pip install 'dropflow[figures]'") from None


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places of the points (cost, value) that no other point beats: cheaper or equal and better or equal.

    Of equal points the first is on the front. Places come in order of cost.
    """
    order = sorted(range(len(points)), key=lambda place: (points[place][0], -points[place][1], place))
    front: list[int] = []
    for place in order:
        if not front or points[place][1] > points[front[-1]][1]:
            front.append(place)
    return front


def draw(rows: Sequence[Row], folder: Path, name: str = "compare") -> list[Path]:
    """Draw every policy with its interval, its control below it, and the front; return the PNG and the SVG.

    Accuracy where answers are known, agreement with the model without a policy where not. Raises `InputError` without
    matplotlib.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = all(row.accuracy is not None for row in rows)
    values = [row.accuracy if known and row.accuracy is not None else row.agreement for row in rows]
    points = [(row.average_visual_tokens, value.value) for row, value in zip(rows, values, strict=True)]
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, value in zip(rows, values, strict=True):
        where = row.average_visual_tokens
        axes.plot([where, where], [value.low, value.high], color=_METHOD, alpha=0.5, linewidth=1)
        axes.plot(where, value.value, "o", color=_METHOD)
        axes.annotate(row.policy, (where, value.value), xytext=(4, 4), textcoords="offset points", fontsize=7)
        if row.control is not None:
            control = row.control.accuracy if known else row.control.agreement
            if control is not None:
                axes.plot(row.control.average_visual_tokens, control.value, "x", color=_CONTROL)
    front = [points[place] for place in pareto_front(points)]
    axes.step(*zip(*front, strict=True), where="post", color=_METHOD, linestyle="--", linewidth=1)
    axes.plot([], [], "o--", color=_METHOD, label="policies and their Pareto front")
    axes.plot([], [], "x", color=_CONTROL, label="random pruning at the same average")
    axes.set_xlabel("visual tokens, average over layers")
    axes.set_ylabel("accuracy" if known else "agreement with the model without a policy")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        with replacing(path) as part:
            figure.savefig(part, dpi=120)
    return paths
