"""`dropflow trace`: which tokens were kept, merged, protected or dropped, as a page to view and a file to replay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dropflow_lab.console.commands.options import AsJson, ModelOption, Overrides
from dropflow_lab.console.commands.output import chatter_to_stderr, emit
from dropflow_lab.files import check_writable, write_text

if TYPE_CHECKING:
    from rich.table import Table

    from dropflow import Policy
    from dropflow_lab.trace import Trace, TracedRun

_POLICY, _QUESTION = "digits-mild", "what digit is yellow ?"
Edits = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATCHES",
        help="With --replay: patches to keep, such as 17,18, or 1/17 for image 1; may be given several times.",
    ),
]


def trace(
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGE]...", help="Pictures the question is about.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about the pictures.")] = None,
    policies: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="NAME_OR_PATH",
            help=f"Policy to trace; give two to see them side by side. Default for the embedded model: {_POLICY}.",
        ),
    ] = None,
    overrides: Overrides = None,
    model: ModelOption = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum answer length in tokens; by default 32.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="The page; the trace is written next to it, as .json.")
    ] = Path("trace.html"),
    replay: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Force the keeps of this trace instead of running policies.")
    ] = None,
    keep: Edits = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(metavar="PATCHES", help="With --replay: patches to drop; 17@6 drops patch 17 at boundary 6."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Trace what policies do to every visual token, at every layer and decode step.

    Writes a page that needs no network, and the trace as JSON (see `dropflow schema --trace`). With --replay the keeps
    of such a file are forced, regardless of scores; --keep and --drop edit them first, and the page then shows the
    traced run next to the edited one.
    """
    from dropflow_lab.errors import InputError
    from dropflow_lab.trace import Trace, page

    with chatter_to_stderr():
        if out.suffix != ".html":
            raise InputError(f"--out: expected a name that ends in .html, got {out}")
        check_writable(out.parent)
        if replay is None:
            if keep or drop:
                raise InputError("--keep, --drop: they change a trace; give it as --replay FILE")
            traced, runs = None, _load(policies, overrides or (), model)
        else:
            if policies or overrides:
                raise InputError(
                    "--policy, --set: cannot be combined with --replay, which forces the trace; leave them out"
                )
            traced = Trace.load(replay)
            runs = _replays(traced, keep or (), drop or ())
        asked = question or (traced.prompt.question if traced else _QUESTION)
        result, shown = _record(images or (), asked, runs, model, max_new_tokens, traced)
        if traced is not None and (keep or drop):
            result = result.model_copy(update={"runs": [*traced.runs, *result.runs]})
        file = out.with_suffix(".json")
        result.save(file)
        write_text(out, page(result, shown))
    told = {"page": str(out), "trace": str(file), "runs": [_told(run) for run in result.runs]}
    emit(told, as_json, _table(result), f"wrote {out} and {file}")


def _load(policies: list[str] | None, overrides: Any, model: Path | None) -> list[Policy]:
    from dropflow import load_policy
    from dropflow_lab.errors import InputError

    if not policies and model is not None:
        raise InputError("--policy: missing; a model of your own needs one (see `dropflow list policies`)")
    return [load_policy(policy, overrides) for policy in policies or [_POLICY]]


def _replays(traced: Trace, keep: Any, drop: Any) -> list[Policy]:
    """Return a replay policy for every run of the edited trace."""
    from dropflow_lab.trace import drop_patches, keep_patches, replay_policy
    from dropflow_lab.trace.edit import read_patches

    for run in range(len(traced.runs)):
        for text in keep:
            image, patches, _ = read_patches(text, "--keep")
            traced = keep_patches(traced, patches, image, run)
        for text in drop:
            image, patches, at = read_patches(text, "--drop")
            traced = drop_patches(traced, patches, image, run, at)
    return [replay_policy(traced, run) for run in range(len(traced.runs))]


def _record(
    images: Any, question: str, runs: list[Policy], model: Path | None, tokens: int | None, traced: Trace | None
) -> tuple[Trace, list[Any]]:
    from dropflow_lab.digits.checkpoints.model import sample_image
    from dropflow_lab.errors import InputError
    from dropflow_lab.inputs.images import read_image
    from dropflow_lab.inputs.models import load_model
    from dropflow_lab.trace import fingerprint, record
    from dropflow_lab.trace.pictures import seen_pictures

    pictures = [read_image(path) for path in images] or [sample_image()]
    if traced is not None and traced.prompt.pictures != [fingerprint(picture) for picture in pictures]:
        raise InputError(
            "--replay: the trace was made from other pictures; give the same ones as IMAGE, in the same order"
        )
    loaded, processor = load_model(model)
    if traced is not None and traced.model != loaded.config.model_type:
        raise InputError(
            f"--replay: the trace was made on a {traced.model}, not a {loaded.config.model_type}; name its model as "
            "--model"
        )
    longest = tokens or (max(len(run.calls) for run in traced.runs) if traced else 32)
    result = record(loaded, processor, pictures, question, runs, longest)
    return result, seen_pictures(processor, pictures, question, len(result.prompt.images))


def _told(run: TracedRun) -> dict[str, Any]:
    return {
        "policy": run.name,
        "answer": run.answer,
        "visual_tokens": [layer.visual_tokens for layer in run.layers],
        "kv_entries": [layer.kv_entries for layer in run.layers],
    }


def _table(result: Trace) -> Table:
    from rich.table import Table

    table = Table(title=result.prompt.question)
    for column in ("policy", "answer", "patches at entry", "average over layers", "KV entries at the end"):
        table.add_column(column, justify="left" if column in ("policy", "answer") else "right")
    for run in result.runs:
        visual = [layer.visual_tokens for layer in run.layers]
        entry = sum(map(len, result.entering(run)))
        table.add_row(
            run.name, run.answer, str(entry), f"{sum(visual) / len(visual):.2f}", str(sum(run.calls[-1].kv_entries))
        )
    return table
