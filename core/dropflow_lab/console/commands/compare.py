"""`dropflow compare`: policies under the same rules, in one table."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dropflow_lab.console.commands import compare_tables
from dropflow_lab.console.commands.options import AsJson, Data, ModelArgument, Overrides
from dropflow_lab.console.commands.output import chatter_to_stderr, emit
from dropflow_lab.files import check_writable, write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dropflow_lab.compare.lineup import Lineup, Models, Subject
    from dropflow_lab.compare.rows import Row
    from dropflow_lab.inputs.data import Sample

_ALL = "all"
_MARK = "comparison"
"""Lines `<!-- comparison -->` and `<!-- end of comparison -->` enclose the comparison in a document."""


class Positions(StrEnum):
    """Position schemes to compare under."""

    PUBLISHED = "published"
    PERSISTENT = "persistent"
    BOTH = "both"


class Precision(StrEnum):
    """Precision of the weights."""

    STORED = "stored"
    FLOAT32 = "float32"


def compare(
    model: ModelArgument = None,
    policies: Annotated[
        str,
        typer.Option(
            metavar="A,B,C",
            help=f"Comma-separated names or paths; `{_ALL}`: every installed policy. POLICY@MODEL: on its own model, "
            "by name or folder; @MODEL: under the policy it records; dense@MODEL: without a policy. A row "
            "with {seed} in it is a mean over seeds.",
        ),
    ] = _ALL,
    models: Annotated[
        str, typer.Option(metavar="A,B", help="Comma-separated names or folders of models; each runs all policies.")
    ] = "",
    positions: Annotated[
        Positions,
        typer.Option(help="persistent: instead of the compact ones that some policies publish; both: a row each."),
    ] = Positions.PUBLISHED,
    data: Data = "digits",
    questions: Annotated[int, typer.Option(min=1, help="Number of questions, the same for all policies.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the embedded questions.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds (0, 1, ...) to replace {seed} by.")] = 3,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for results and finished measurements.")] = Path(
        "dropflow-compare"
    ),
    rescale: Annotated[bool, typer.Option(help="Scale policies that were tuned for another model to this one.")] = True,
    control_seeds: Annotated[
        int, typer.Option(min=0, help="Seeds of each policy's control, random pruning at equal average tokens.")
    ] = 1,
    downsample: Annotated[
        str,
        typer.Option(metavar="N,M", help="Also run without a policy on pictures downsampled to N visual tokens."),
    ] = "",
    timed: Annotated[int, typer.Option(min=0, help="Questions on which FLOPs, memory and time are measured.")] = 4,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of paired timing.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum answer length in tokens.")] = 16,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    dtype: Annotated[
        Precision, typer.Option(help="Precision of the weights; the embedded models run in float32 anyway.")
    ] = Precision.STORED,
    apart: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Kinds of questions to leave out of accuracy and show in separate columns."),
    ] = None,
    by_kind: Annotated[bool, typer.Option("--by-kind", help="Print the accuracy of every kind of question.")] = False,
    overrides: Overrides = None,
    into: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also update the comparison in a Markdown file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare policies on the same questions: answers, visual tokens, FLOPs, memory and time.

    Accuracy, and agreement with the answers of the model without a policy, have 95 % intervals. `gain` is the gain over
    random pruning at the policy's own average tokens, question by question. Of the embedded questions, those that ask
    for numbers of digits (`count`, `total`) and for all of them (`read`) are shown separately. `--data clips` asks
    about videos of eight frames, by default of the embedded model `clips`. A policy whose numbers were
    scaled to the model is marked as rescaled. Times are ratios to the model without a policy, timed in turn in this
    process. Every finished measurement is stored in the folder, so that an interrupted run continues where it stopped.
    Writes compare.json, compare.png and compare.svg.
    """
    from contextlib import nullcontext

    from dropflow_lab.compare.compare import Rules
    from dropflow_lab.compare.compare import compare as measure
    from dropflow_lab.compare.figure import require_matplotlib
    from dropflow_lab.compare.lineup import load_models, subjects_of
    from dropflow_lab.inputs.data import CLIPS, read_samples
    from dropflow_lab.inputs.prompts import check_questions
    from dropflow_lab.markdown import around
    from dropflow_lab.measure.machine import this_machine, torch_threads
    from dropflow_lab.store.finished import Finished

    kinds = _apart(apart, data)
    require_matplotlib()
    named, several = _names(policies, models, model)
    with chatter_to_stderr(), torch_threads(threads) if threads else nullcontext():
        check_writable(out)
        if into is not None:
            around(into, _MARK)  # a document that cannot be updated is refused before anything is measured
        samples = read_samples(data, questions, seed)
        subjects = subjects_of(_sources(named), several)
        shared = Path(CLIPS) if model is None and data == CLIPS else model
        loaded = load_models(subjects, seeds, partial(_load, shared, dtype))
        for _, processor in loaded.values():
            check_questions(processor, samples)
        settings = [*(overrides or ()), *(["rescale=true"] if rescale else [])]
        found = _lined_up(subjects, loaded, settings, seeds, positions, named)
        rules = Rules(batch, max_new_tokens, control_seeds, timed, rounds, _numbers(downsample), kinds)
        rows = list(measure(found.entries, loaded, samples, Finished(out / "finished"), rules))
        result = {
            "data": data,
            "questions": len(samples),
            "seed": seed,
            "apart": kinds,
            "rows": [row.to_json() for row in rows],
            "refused": found.refused,
            "machine": this_machine().__dict__,
        }
        asked = _asked(samples, seed, kinds)
        _write(rows, result, out, asked, into)
    told = [_told(name, reason) for name, reason in found.refused.items()]
    told += [f"{asked} Intervals are 95 %. Written to {out}."]
    tables = [compare_tables.answers(rows, kinds)]
    tables += [compare_tables.kinds(rows)] if by_kind else []
    tables += [compare_tables.costs(rows)] if timed else []
    emit(result, as_json, *tables, "\n".join(told))


def _names(policies: str, models: str, model: Path | None) -> tuple[list[str], list[str]]:
    """Return the names of policies and models; raises `InputError` for none, or for models beside `model`."""
    from dropflow_lab.errors import InputError

    named, several = _listed(policies), _listed(models)
    if not named:
        raise InputError(f"--policies: expected comma-separated names or paths, or `{_ALL}`, got {policies!r}")
    if several and model is not None:
        raise InputError(f"--models: a model is given already, {model}; name all of them in --models")
    return named, several


def _lined_up(
    subjects: Sequence[Subject],
    loaded: Models,
    settings: Sequence[str],
    seeds: int,
    positions: Positions,
    named: Sequence[str],
) -> Lineup:
    """Return the rows to measure under the position schemes asked for; raises `InputError` as `_refuse_named`."""
    from dropflow_lab.compare.lineup import line_up

    schemes = {
        "published": positions is not Positions.PERSISTENT,
        "persistent": positions is not Positions.PUBLISHED,
    }
    found = line_up(subjects, loaded, settings, seeds=seeds, **schemes)
    _refuse_named(found, named)
    return found


def _write(rows: Sequence[Row], result: dict[str, Any], out: Path, asked: str, into: Path | None) -> None:
    """Write result and figure into `out`, and the comparison into the document."""
    import json

    from dropflow_lab.compare.figure import draw
    from dropflow_lab.compare.page import page
    from dropflow_lab.markdown import renew

    write_text(out / "compare.json", json.dumps(result, indent=2))
    draw(rows, out)
    if into is not None:
        renew(into, _MARK, page(rows, result["refused"], asked, result["apart"]))


def _sources(named: Sequence[str]) -> list[str]:
    """Return the names, with `all` replaced by every installed policy."""
    from dropflow.policy.registry import policy_files

    return [name for one in named for name in (sorted(policy_files()) if one == _ALL else [one])]


def _load(shared: Path | None, dtype: Precision, name: str) -> tuple[Any, Any]:
    """Return model and processor of a checkpoint name or folder; without one, the shared model."""
    from dropflow_lab.inputs.models import load_model

    model, processor = load_model(Path(name) if name else shared)
    return (model.float() if dtype is Precision.FLOAT32 else model), processor


def _refuse_named(found: Lineup, named: Sequence[str]) -> None:
    """Raise `InputError` if a policy that was requested by name does not fit; with `all`, some may not."""
    from dropflow_lab.errors import InputError

    asked = {
        name: reason
        for name, reason in found.refused.items()
        if _ALL not in named or not {name, name.partition("@")[0]}.isdisjoint(named)
    }
    if asked:
        raise InputError("\n".join(f"--policies: {_told(name, reason)}" for name, reason in asked.items()))


def _told(name: str, reason: str) -> str:
    """Return why a policy is refused, with its name before it, once."""
    return f"{name}: {reason.removeprefix(f'{name}: ')}"


def _apart(given: str | None, data: str) -> tuple[str, ...]:
    """Return the kinds shown separately: those requested, or the embedded kinds that ask about every digit."""
    from dropflow_lab.inputs.data import CLIPS, EMBEDDED

    if data in EMBEDDED:
        from dropflow_lab.console.commands.digits import require_scikit_learn
        from dropflow_lab.digits.data.clip_questions import HOW_MANY

        require_scikit_learn()
        apart = HOW_MANY if data == CLIPS else ("count", "read")
        return apart if given is None else tuple(_listed(given))
    return tuple(_listed(given or ""))


def _asked(samples: Sequence[Sample], seed: int, apart: Sequence[str]) -> str:
    kinds = dict.fromkeys(sample.kind for sample in samples if sample.kind)
    main = [sample for sample in samples if sample.kind not in apart]
    left_out = [kind for kind in apart if kind in kinds]
    if not left_out:
        return f"{len(samples)} questions, seed {seed}."
    names = " and ".join(f"`{kind}`" for kind in left_out)
    return f"{len(samples)} questions, seed {seed}; accuracy is over {len(main)} of them, without {names}."


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> tuple[int, ...]:
    parts = _listed(text)
    if not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"expected comma-separated numbers above 0, got {text!r}", param_hint="--downsample")
    return tuple(int(part) for part in parts)
