"""`dropflow tune`: a search for the policies that change a model's answers least at a given cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dropflow_lab.console.commands.options import AsJson, Data, ModelArgument
from dropflow_lab.console.commands.output import chatter_to_stderr, emit
from dropflow_lab.files import check_writable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from dropflow.policy.cost_budget import CostBudget
    from dropflow_lab.inputs.data import Sample
    from dropflow_lab.tune.tune import Point, Tuned


def tune(
    budget: Annotated[
        str,
        typer.Option(
            metavar="KIND=N,M",
            help="What a policy may cost: average_tokens, flops or kv (docs/write-a-policy.md); one search for each "
            "number.",
        ),
    ],
    model: ModelArgument = None,
    data: Data = "digits",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for results and finished work.")] = Path("tuned"),
    methods: Annotated[
        str, typer.Option(metavar="A,B", help="Stages to mix; by default all that take a number of tokens.")
    ] = "",
    start: Annotated[
        str, typer.Option(metavar="A,B", help="Policies to start from; by default all that are installed.")
    ] = "",
    questions: Annotated[int, typer.Option(min=2, help="Questions to tune on, from the first on.")] = 160,
    held_out: Annotated[int, typer.Option(min=2, help="Other questions, to score what was found.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the search, and of the embedded questions.")] = 0,
    trials: Annotated[int, typer.Option(min=1, help="Policies to try at each budget, beside the first ones.")] = 96,
    generation: Annotated[
        int, typer.Option(min=1, help="Policies proposed together; no more processes than these can share the search.")
    ] = 8,
    rivals: Annotated[int, typer.Option(min=0, help="Shipped policies to compare with on the held-out questions.")] = 6,
    profiled: Annotated[int, typer.Option(min=0, help="Questions of the layer profile to start from; 0: none.")] = 32,
    timed: Annotated[int, typer.Option(min=0, help="Questions on which FLOPs, KV and time are measured.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum answer length in tokens.")] = 16,
    apart: Annotated[
        str | None, typer.Option(metavar="A,B", help="Kinds of questions to leave out, as `compare` does.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Search for policies that stay closest to the model at a given cost, without training and without labels.

    Closeness is the KL divergence of the answers from those without a policy. Policies mix stages of all methods; their
    numbers of tokens follow from the budget. Writes tune.json, the Pareto front as tune.png and tune.svg, and the best
    policy of each budget as YAML, with its score on questions it was not chosen by. Finished work is stored in the
    folder: an interrupted search continues, and several processes share one (docs/tune.md).
    """
    from dropflow.backbone.backbone import backbone_for
    from dropflow_lab.compare.figure import require_matplotlib
    from dropflow_lab.inputs.models import load_model
    from dropflow_lab.inputs.prompts import check_questions
    from dropflow_lab.store.finished import Finished
    from dropflow_lab.tune.judge import Judge
    from dropflow_lab.tune.methods import find_methods
    from dropflow_lab.tune.published import published
    from dropflow_lab.tune.study import Search, require_optuna
    from dropflow_lab.tune.tune import Ask, front, measured
    from dropflow_lab.tune.tune import tune as search
    from dropflow_lab.tune.write import write_tuned

    require_optuna()
    require_matplotlib()
    budgets = _budgets(budget)
    kind = budgets[0].kind
    check_writable(out)
    with chatter_to_stderr():
        mixed, starts = find_methods(_listed(methods)), published(_listed(start))
        tuning, others = _split(data, questions, held_out, seed, apart)
        loaded, processor = load_model(model)
        check_questions(processor, [*tuning, *others])
        finished, how = Finished(out / "finished"), Search(trials, generation, seed)
        asking = Ask(batch, max_new_tokens, rivals, profiled)
        tuned = search(loaded, processor, tuning, others, budgets, mixed, starts, finished, how, asking)
        judge = Judge(loaded, processor, tuning, finished, batch, max_new_tokens)
        points = measured(loaded, processor, front(tuned, kind), judge, timed)
        name = "the embedded model" if model is None else str(model)
        told = write_tuned(tuned, points, kind, backbone_for(loaded).shape, name, how, out)
    emit(told, as_json, _front(points), *(_table(one) for one in tuned), f"Intervals are 95 %. Written to {out}.")


def _budgets(text: str) -> list[CostBudget]:
    from pydantic import ValidationError

    from dropflow.policy.cost_budget import CostBudget
    from dropflow_lab.errors import InputError

    kind, _, numbers = text.partition("=")
    try:
        return [CostBudget.model_validate({kind.strip(): _number(one)}) for one in _listed(numbers) or [""]]
    except (ValidationError, ValueError):
        raise InputError(
            f"--budget: expected average_tokens=N, flops=SHARE or kv=SHARE, with commas between numbers, got {text!r}"
        ) from None


def _number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


def _split(data: str, questions: int, held_out: int, seed: int, apart: str | None) -> tuple[list[Sample], list[Sample]]:
    """Questions to tune on, and others about other pictures."""
    from dropflow_lab.errors import InputError
    from dropflow_lab.inputs.data import DIGITS, EMBEDDED, read_samples

    if data in EMBEDDED:
        from dropflow_lab.console.commands.digits import require_scikit_learn

        require_scikit_learn()
        found = [read_samples(data, questions, 2 * seed), read_samples(data, held_out, 2 * seed + 1)]
    else:
        every = read_samples(data, questions + held_out)
        found = [every[:questions], every[questions:]]
    leave = ("count", "read") if apart is None and data == DIGITS else tuple(_listed(apart or ""))
    tuning, others = ([sample for sample in part if sample.kind not in leave] for part in found)
    seen = {picture.name for sample in tuning for picture in sample.pictures}
    others = [sample for sample in others if seen.isdisjoint(picture.name for picture in sample.pictures)]
    if len(tuning) < 2 or len(others) < 2:
        raise InputError(
            f"{data}: expected at least 2 questions to tune on and 2 others about other pictures, got {len(tuning)} "
            f"and {len(others)}; give more questions, or lower --questions"
        )
    return tuning, others


def _front(points: Sequence[Point]) -> Table:
    from rich.table import Table

    table = Table(title="Pareto front")
    for name in ("policy", "KL", "average tokens", "FLOPs", "KV cache", "first token", "total time"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for point in points:
        verdict, cost = point.trial.verdict, point.cost
        times = None if cost is None else cost.times
        timed = ("-", "-") if times is None else (f"{times.prefill.median:.2f}", f"{times.total.median:.2f}")
        shares = (f"{verdict.average_tokens:.1f}", f"{verdict.flops:.1%}", f"{verdict.kv:.1%}")
        table.add_row(point.trial.policy.name, f"{verdict.distance:.3f}", *shares, *timed)
    return table


def _table(tuned: Tuned) -> Table:
    from rich.table import Table

    from dropflow_lab.compare.cells import share, signed

    held_out, budget = tuned.held_out, tuned.searched.budget
    title = (
        f"{budget.kind} {getattr(budget, budget.kind):g}: {len(tuned.searched.trials)} policies tried, held-out score"
    )
    table = Table(title=title)
    for name in ("policy", "KL", "score", "gain of the best", "closer by, nats"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    table.add_row("without a policy", "0", share(held_out.dense), "", "")
    table.add_row(tuned.best.policy.name, f"{held_out.verdict.distance:.3f}", share(held_out.score), "", "")
    for one in held_out.against:
        value, low, high = one.kl
        score = f"{held_out.score.value - one.gain.value:.1%}"
        closer = f"{value:+.3f} ({low:+.3f} .. {high:+.3f})"
        table.add_row(one.policy.name, f"{one.verdict.distance:.3f}", score, signed(one.gain), closer)
    return table


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
