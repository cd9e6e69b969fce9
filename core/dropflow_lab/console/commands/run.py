"""`dropflow run`: one question without and with a policy, and what the policy saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dropflow_lab.console.commands.options import AsJson, Overrides
from dropflow_lab.console.commands.output import chatter_to_stderr, emit, si

if TYPE_CHECKING:
    from rich.table import Table

    from dropflow_lab.explain.side_by_side import Comparison

_TRAINED, _QUESTION = "hidrop", "what digit is yellow ?"


def run(
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGE]...", help="Pictures the question is about.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about the pictures.")] = None,
    policy: Annotated[
        str | None,
        typer.Option(metavar="NAME_OR_PATH", help="Policy to run under; by default the one that the model records."),
    ] = None,
    overrides: Overrides = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Local model folder; `dense` and `hidrop` are the embedded models."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum answer length in tokens.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Ask a model about pictures without and with a policy; print both answers, tokens per layer, FLOPs and KV bytes.

    Without arguments, two small models that come with the package are asked about their sample picture: the dense one
    without a policy, and one trained through HiDrop under the policy that it records.
    """
    from dropflow import load_policy
    from dropflow.policy.recorded import FIELD
    from dropflow_lab.digits.checkpoints.model import sample_image
    from dropflow_lab.errors import InputError
    from dropflow_lab.explain.side_by_side import compare
    from dropflow_lab.inputs.images import read_image
    from dropflow_lab.inputs.models import load_model, policy_of

    with chatter_to_stderr():
        named = None if policy is None else load_policy(policy, overrides or ())
        pictures = [read_image(path) for path in images or ()] or [sample_image()]
        both = policy is None and model is None
        loaded, processor = load_model(Path(_TRAINED) if both else model)
        if named is None and getattr(loaded.config, FIELD, None) is None:
            raise InputError("--policy: missing, and the model records none (see `dropflow list policies`)")
        chosen = named or policy_of(loaded, overrides or ())
        plain = load_model()[0] if both else None
        comparison = compare(loaded, processor, pictures, question or _QUESTION, chosen, max_new_tokens, plain=plain)
    emit(comparison.to_json(), as_json, _table(comparison), _summary(comparison, both))


def _table(comparison: Comparison) -> Table:
    from rich.table import Table

    table = Table(title=comparison.report.policy)
    for column in ("layer", "visual tokens", "KV entries", "FLOPs"):
        table.add_column(column, justify="right")
    for layer in comparison.report.layers:
        table.add_row(str(layer.layer), f"{layer.visual_tokens:g}", f"{layer.kv_entries:g}", si(layer.flops))
    return table


def _summary(comparison: Comparison, both: bool) -> Table:
    from rich.table import Table

    report, whole = comparison.report, str(comparison.visual_tokens)
    names = ("dense model", "trained with policy") if both else ("without", "with policy")
    table = Table("", *names, title=comparison.question)
    table.add_row("answer", comparison.answer_dense, comparison.answer)
    if report.tower_visual_tokens is not None and report.tower_visual_tokens_dense is not None:
        dense, tower = report.tower_visual_tokens_dense, report.tower_visual_tokens
        table.add_row("visual tokens in the vision tower, average over layers", f"{dense:g}", f"{tower:.2f}")
    table.add_row("visual tokens at entry to the LLM", whole, f"{report.entry_visual_tokens:g}")
    table.add_row("visual tokens, average over layers", whole, f"{report.average_visual_tokens:.2f}")
    table.add_row("FLOPs of the prefill", si(report.flops_dense), si(report.flops))
    table.add_row("KV cache", si(report.kv_bytes_dense, "B"), si(report.kv_bytes, "B"))
    return table
