"""`dropflow run`: one question with and without a policy, and what the policy saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dropflow_lab.commands.options import AsJson, Overrides
from dropflow_lab.output import chatter_to_stderr, emit, si

if TYPE_CHECKING:
    from rich.table import Table

    from dropflow_lab.comparison import Comparison

_POLICY, _QUESTION = "digits-mild", "what digit is yellow ?"


def run(
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGE]...", help="Pictures the question is about.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about the pictures.")] = None,
    policy: Annotated[
        str | None, typer.Option(metavar="NAME_OR_PATH", help=f"Policy to run under; {_POLICY} for the embedded model.")
    ] = None,
    overrides: Overrides = None,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Local model folder; the embedded model without one.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Ask a model about pictures without and with a policy; print both answers, tokens per layer, FLOPs and KV bytes.

    Without arguments, the small model that comes with the package is asked about its sample picture.
    """
    from dropflow import load_policy
    from dropflow_lab.comparison import compare
    from dropflow_lab.digits import sample_image
    from dropflow_lab.errors import InputError
    from dropflow_lab.images import read_image
    from dropflow_lab.models import load_model

    with chatter_to_stderr():
        if policy is None and model is not None:
            raise InputError("--policy: missing; a model of your own needs one (see `dropflow list policies`)")
        chosen = load_policy(policy or _POLICY, overrides or ())
        pictures = [read_image(path) for path in images or ()] or [sample_image()]
        loaded, processor = load_model(model)
        comparison = compare(loaded, processor, pictures, question or _QUESTION, chosen, max_new_tokens)
    emit(comparison.to_json(), as_json, _table(comparison), _summary(comparison))


def _table(comparison: Comparison) -> Table:
    from rich.table import Table

    table = Table(title=comparison.report.policy)
    for column in ("layer", "visual tokens", "KV entries", "FLOPs"):
        table.add_column(column, justify="right")
    for layer in comparison.report.layers:
        table.add_row(str(layer.layer), f"{layer.visual_tokens:g}", f"{layer.kv_entries:g}", si(layer.flops))
    return table


def _summary(comparison: Comparison) -> Table:
    from rich.table import Table

    report, whole = comparison.report, str(comparison.visual_tokens)
    table = Table("", "without", "with policy", title=comparison.question)
    table.add_row("answer", comparison.answer_dense, comparison.answer)
    table.add_row("visual tokens at entry to the LLM", whole, f"{report.entry_visual_tokens:g}")
    table.add_row("visual tokens, average over layers", whole, f"{report.average_visual_tokens:.2f}")
    table.add_row("FLOPs of the prefill", si(report.flops_dense), si(report.flops))
    table.add_row("KV cache", si(report.kv_bytes_dense, "B"), si(report.kv_bytes, "B"))
    return table
