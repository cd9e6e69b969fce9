"""How a report is displayed: as one line, as a table, in a notebook, and as a figure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dropflow.engine.decoder.html_table import html_table
from dropflow.errors import MissingPackage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dropflow.engine.decoder.report import Report

_HEAD = ("layer", "visual tokens", "KV entries", "KV at the end", "multiply-adds")
_BEFORE, _AFTER = "#0072B2", "#E69F00"  # from Okabe and Ito's palette, safe for colour-blind readers


def line(report: Report) -> str:
    """A report in one line."""
    return (
        f"<Report of {report.policy!r}: {report.entry_visual_tokens:g} visual tokens at entry, "
        f"{report.average_visual_tokens:.2f} on average over {len(report.layers)} layers, "
        f"{_share(report.flops, report.flops_dense)} of the dense FLOPs, "
        f"{_share(report.kv_bytes_end, report.kv_bytes_end_dense)} of the dense KV bytes "
        f"after {_times(report.steps, 'step')}>"
    )


def table(report: Report) -> str:
    """A table with one row per layer, followed by the totals."""
    widths = [max(len(name), 5) for name in _HEAD]
    rows = ("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in _rows(report))
    return "\n".join([_entry(report), *rows, *_sums(report)])


def html(report: Report) -> str:
    """The same table for a notebook."""
    head, *rows = _rows(report)
    return html_table(_entry(report), head, rows, _sums(report))


def figure(report: Report) -> Figure:
    """Visual tokens and KV entries of each layer, as bars.

    Raises `MissingPackage` without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackage("plot: needs matplotlib: pip install 'dropflow[figures]'") from None
    drawn = Figure(figsize=(9, 4), layout="constrained")
    tokens, entries = drawn.subplots(1, 2)
    layers = [row.layer for row in report.layers]
    tokens.bar(layers, [row.visual_tokens for row in report.layers], color=_BEFORE)
    tokens.set_ylabel("visual tokens in the prefill")
    for shift, color, label, held in (
        (-0.2, _BEFORE, "after the prefill", [row.kv_entries for row in report.layers]),
        (0.2, _AFTER, f"after {_times(report.steps, 'step')}", [row.kv_entries_end for row in report.layers]),
    ):
        entries.bar([layer + shift for layer in layers], held, width=0.4, color=color, label=label)
    entries.set_ylabel("KV entries")
    entries.legend()
    for axes in (tokens, entries):
        axes.set_xlabel("decoder layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    drawn.suptitle(report.policy)
    return drawn


def _rows(report: Report) -> Iterator[tuple[str, ...]]:
    yield _HEAD
    for row in report.layers:
        numbers = (row.visual_tokens, row.kv_entries, row.kv_entries_end)
        yield (str(row.layer), *(f"{number:.6g}" for number in numbers), f"{row.flops:.4g}")


def _entry(report: Report) -> str:
    return (
        f"{report.policy}: {report.entry_visual_tokens:g} visual tokens at entry to the LLM, "
        f"{report.average_visual_tokens:.2f} on average over {len(report.layers)} layers"
    )


def _sums(report: Report) -> list[str]:
    """The totals after the table, line by line."""
    found = [
        f"multiply-adds {report.flops:.4g} (dense {report.flops_dense:.4g}), "
        f"KV bytes {report.kv_bytes:g} (dense {report.kv_bytes_dense:g})"
    ]
    tower, whole = report.tower_visual_tokens, report.tower_visual_tokens_dense
    if tower is not None and whole is not None and tower < whole:
        found.append(f"vision tower: {tower:g} visual tokens on average over its layers (dense {whole:g})")
    if report.overlap is not None:
        found.append(report.overlap)
    if report.steps:
        found.append(
            f"after {_times(report.steps, 'more token')}: KV bytes {report.kv_bytes_end:g} "
            f"(dense {report.kv_bytes_end_dense:g}), "
            f"{report.average_visual_tokens_answer:.2f} visual tokens attended to on average"
        )
        held = sum(report.kv_entries_over_time[1:])
        if sum(report.kv_entries_read_over_time) < held - 0.5:
            found.append(f"a step reads {report.kv_bytes_read:g} KV bytes on average; the other entries stay parked")
    return found


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _times(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
