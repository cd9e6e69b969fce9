"""`dropflow compare`: policies under the same rules, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dropflow_lab.console.commands.options import AsJson, Data, ModelArgument, Overrides
from dropflow_lab.console.commands.output import chatter_to_stderr, emit, si
from dropflow_lab.files import check_writable, write_text

if TYPE_CHECKING:
    from rich.table import Table

    from dropflow_lab.compare.cost import Cost
    from dropflow_lab.compare.rows import Row
    from dropflow_lab.measure.intervals import Mean
    from dropflow_lab.measure.timing import Spread

_ALL = "all"
_NONE = "-"


def compare(
    model: ModelArgument = None,
    policies: Annotated[
        str,
        typer.Option(metavar="A,B,C", help=f"Names or paths, with commas; `{_ALL}`: every installed one."),
    ] = _ALL,
    data: Data = "digits",
    questions: Annotated[int, typer.Option(min=1, help="Questions, the same ones for all.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the embedded questions.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for results and for finished measurements.")] = Path(
        "dropflow-compare"
    ),
    rescale: Annotated[
        bool, typer.Option(help="Apply policies that were tuned for another model in proportion to this one.")
    ] = True,
    control_seeds: Annotated[
        int, typer.Option(min=0, help="Seeds of random pruning at equal average tokens, beside every policy.")
    ] = 1,
    downsample: Annotated[
        str,
        typer.Option(
            metavar="N,M", help="Also ask without a policy about pictures that keep N tokens' worth of pixels."
        ),
    ] = "",
    timed: Annotated[int, typer.Option(min=0, help="Questions on which FLOPs, memory and time are measured.")] = 4,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of paired timing.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    overrides: Overrides = None,
    into: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Renew the table of the comparison in a Markdown file, too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare policies on the same questions: answers, visual tokens, FLOPs, memory and time.

    Accuracy and agreement with the answers of the model without a policy have 95 % intervals. `gain` is what a policy
    is above random pruning at its own average tokens, question by question. Times are ratios to the model without a
    policy, timed in turn in this process. Every finished measurement is a file in the folder, so that a run that was
    stopped goes on where it was. Writes compare.json, compare.png and compare.svg.
    """
    import json
    from contextlib import nullcontext

    from dropflow.policy.registry import policy_files
    from dropflow_lab.compare.compare import Comparing, Rules, fitting
    from dropflow_lab.compare.figure import draw, require_matplotlib
    from dropflow_lab.compare.store import Finished
    from dropflow_lab.errors import InputError
    from dropflow_lab.inputs.data import DIGITS, read_samples
    from dropflow_lab.inputs.models import load_model
    from dropflow_lab.inputs.prompts import check_questions
    from dropflow_lab.markdown import renew
    from dropflow_lab.measure.machine import this_machine, torch_threads

    if data == DIGITS:
        from dropflow_lab.console.commands.digits import require_scikit_learn

        require_scikit_learn()
    require_matplotlib()
    named = [name.strip() for name in policies.split(",") if name.strip()]
    if not named:
        raise InputError(f"--policies: expected names or paths with commas, or `{_ALL}`, got {policies!r}")
    with chatter_to_stderr(), torch_threads(threads) if threads else nullcontext():
        check_writable(out)
        samples = read_samples(data, questions, seed)
        loaded, processor = load_model(model)
        check_questions(processor, samples)
        sources = sorted(policy_files()) if named == [_ALL] else named
        settings = [*(overrides or ()), *(["rescale=true"] if rescale else [])]
        fit, refused = fitting(loaded, sources, settings)
        if refused and named != [_ALL]:
            raise InputError("\n".join(f"--policies: {name}: {reason}" for name, reason in refused.items()))
        rules = Rules(batch, max_new_tokens, control_seeds, timed, rounds, _numbers(downsample))
        rows = list(Comparing(loaded, processor, samples, Finished(out / "finished"), rules).rows(fit))
        result = {
            "data": data,
            "questions": len(samples),
            "seed": seed,
            "rows": [row.to_json() for row in rows],
            "refused": refused,
            "machine": this_machine().__dict__,
        }
        write_text(out / "compare.json", json.dumps(result, indent=2))
        draw(rows, out)
        if into is not None:
            renew(into, "comparison", f"{len(samples)} questions, seed {seed}.\n\n{_markdown(rows)}")
    told = [f"{name}: {reason}" for name, reason in refused.items()]
    told += [f"{len(samples)} questions; intervals are 95 %; written to {out}"]
    emit(result, as_json, _answers(rows), *([_costs(rows)] if timed else []), "\n".join(told))


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(
            f"expected numbers above 0 with commas in between, got {text!r}", param_hint="--downsample"
        )
    return tuple(int(part) for part in parts)


def _answers(rows: Sequence[Row]) -> Table:
    from rich.table import Table

    table = Table(title="visual tokens (average over layers, and at entry) and answers")
    table.add_column("policy", overflow="fold")
    for column in ("average", "entry", "accuracy", "agreement", "random", "gain"):
        table.add_column(column, justify="right")
    for row in rows:
        control = row.control
        table.add_row(
            row.policy,
            f"{row.average_visual_tokens:.2f}",
            f"{row.entry_visual_tokens:.2f}",
            _percent(row.accuracy),
            _percent(row.agreement),
            _NONE if control is None else _percent(control.accuracy or control.agreement),
            _NONE if control is None else _percent(control.gain, sign="+"),
        )
    return table


def _markdown(rows: Sequence[Row]) -> str:
    from dropflow_lab.markdown import table

    head = ("policy", "average tokens", "at entry", "accuracy", "random", "gain", "FLOPs", "KV", "prefill time")
    return table(head, [_line(row, rows[0].cost) for row in rows])


def _line(row: Row, dense: Cost | None) -> list[str]:
    control, cost = row.control, row.cost
    shares = [_NONE] * 3
    if cost is not None and dense is not None:
        flops, kv = (getattr(cost.work, name) / getattr(dense.work, name) for name in ("flops_formula", "kv_bytes"))
        shares = [f"{flops:.1%}", f"{kv:.1%}", _NONE if cost.times is None else _ratio(cost.times.prefill)]
    return [
        f"`{row.policy}`",
        f"{row.average_visual_tokens:.1f}",
        f"{row.entry_visual_tokens:.1f}",
        _percent(row.accuracy or row.agreement),
        _NONE if control is None else _percent(control.accuracy or control.agreement),
        _NONE if control is None else _percent(control.gain, sign="+"),
        *shares,
    ]


def _costs(rows: Sequence[Row]) -> Table:
    from rich.table import Table

    table = Table(title="cost; times are ratios to the model without a policy, shares are of its total time")
    table.add_column("policy", overflow="fold")
    for column in ("FLOPs", "counted", "KV", "peak", "prefill", "decode", "vision", "selection", "rest"):
        table.add_column(column, justify="right")
    for row in rows:
        if row.cost is not None:
            table.add_row(row.policy, *_cost(row.cost))
    return table


def _cost(cost: Cost) -> list[str]:
    work, times = cost.work, cost.times
    shown: list[Any] = [] if times is None else [times.prefill, times.decode]
    shares: list[Any] = [] if times is None else [times.vision_share, times.selection_share, times.prefill_share]
    return [
        si(work.flops_formula),
        si(work.flops_counted),
        si(work.kv_bytes, "B"),
        si(work.peak_bytes, "B"),
        *(_ratio(one) for one in shown),
        *(f"{one.median:.1%}" for one in shares),
    ]


def _percent(mean: Mean | None, sign: str = "") -> str:
    return _NONE if mean is None else f"{mean.value:{sign}.1%} ({mean.low:{sign}.1%} .. {mean.high:{sign}.1%})"


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f} .. {spread.high:.2f})"
