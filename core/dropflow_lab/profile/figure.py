"""Draws a profile: similarities, ILVAS and answer quality, over a shared axis of boundaries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropflow_lab.files import replacing
from dropflow_lab.profile.profile import Profile, mean_ilvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can tell apart; each line also has its own marker
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#595959"


def draw(profile: Profile, paths: Iterable[Path]) -> None:
    """Write the figure to each of `paths`, in the format of its suffix."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "dropflow", "font.size": 10, "axes.grid": True, "grid.alpha": 0.3}):
        figure = _figure(profile)
        for path in paths:
            with replacing(path) as part:
                figure.savefig(part, dpi=90, metadata={"Date": None} if path.suffix == ".svg" else {})


def _figure(profile: Profile) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 9), layout="constrained")
    above, middle, below = figure.subplots(3, sharex=True)
    _similarities(above, profile)
    _ilvas(middle, profile)
    _answers(below, profile)
    for number, axes in enumerate((above, middle, below)):
        _boundaries(axes, profile, labelled=number == 0)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    below.set_xlabel("boundary (the point before decoder layer i)")
    below.set_xticks(range(0, profile.layers + 1, max(1, profile.layers // 16)))
    below.set_xlim(-0.5, profile.layers + 0.5)
    return figure


def _similarities(axes: Axes, profile: Profile) -> None:
    curves = profile.curves
    _line(axes, curves.intra["visual"], "visual tokens\nacross layer i", BLUE, "o")
    _line(axes, curves.intra["instruction"], "instruction\nacross layer i", ORANGE, "s", dashed=True)
    _line(axes, curves.cross, "cross-modal", GREEN, "^")
    shown = [value for value in (*curves.intra["visual"], *curves.cross) if value is not None]
    low = min(shown, default=0.0)
    axes.set_ylim(low - 0.08 * (1 - low), 1 + 0.04 * (1 - low))
    axes.set_ylabel("cosine")
    axes.set_title("Similarity; low: the layer changes much, or the picture is in the text")


def _ilvas(axes: Axes, profile: Profile) -> None:
    for (distance, curve), (color, marker) in zip(
        profile.curves.ilvas.items(), ((BLUE, "o"), (ORANGE, "s")), strict=False
    ):
        _line(axes, curve, f"ILVAS(i, i+{distance})", color, marker, dashed=True)
    if len(profile.curves.ilvas) > 1:
        _line(axes, mean_ilvas(profile.curves), "mean", GREY, "D")
    axes.set_ylabel("cosine")
    axes.set_title("ILVAS: high means that later layers look at visual tokens as this one does")


def _answers(axes: Axes, profile: Profile) -> None:
    known = profile.dense.accuracy is not None
    _line(axes, [quality.score for quality in profile.exits], "no vision\nfrom i on", PURPLE, "o")
    _line(axes, [quality.score for quality in profile.entries], "vision enters\nat i", ORANGE, "s", dashed=True)
    axes.axhline(profile.dense.score, color=GREY, linewidth=1, linestyle=":", label="no policy")
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("accuracy" if known else "agreement")
    axes.set_title("Answers of the model as it is, not trained for either")


def _line(
    axes: Axes, curve: Sequence[float | None], label: str, color: str, marker: str, *, dashed: bool = False
) -> None:
    values: Any = [float("nan") if value is None else value for value in curve]
    axes.plot(range(len(curve)), values, "--" if dashed else "-", color=color, marker=marker, markersize=5, label=label)


def _boundaries(axes: Axes, profile: Profile, *, labelled: bool) -> None:
    """Mark what the rule chose; only the first panel has labels."""
    choice = profile.choice
    marks = [
        (choice.entry, "enter"),
        *((at, f"keep {keep}") for at, keep in choice.keep.items()),
        (choice.exit, "exit"),
    ]
    for at, word in marks:
        axes.axvline(at, color="black", linewidth=1, linestyle="-" if word in ("enter", "exit") else ":", zorder=0)
        if labelled:
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            place = axes.get_xaxis_transform()
            axes.text(at - 0.08, 0.03, word, rotation=90, va="bottom", ha="right", transform=place, bbox=paper)
