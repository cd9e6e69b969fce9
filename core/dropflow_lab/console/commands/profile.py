"""`dropflow profile`: what each layer does with visual tokens, and the policy that follows from it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dropflow_lab.console.commands.options import AsJson, Data, ModelArgument
from dropflow_lab.console.commands.output import chatter_to_stderr, emit
from dropflow_lab.files import check_writable

if TYPE_CHECKING:
    from rich.table import Table

    from dropflow_lab.profile import Profile

Boundary = Annotated[int | None, typer.Option(min=0, help="Boundary to use instead of the rule's.")]


def profile(
    model: ModelArgument = None,
    data: Data = "digits",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output folder.")] = Path("profile"),
    questions: Annotated[int, typer.Option(min=1, help="Number of questions to use, from the first on.")] = 160,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the digits questions.")] = 7,
    fewer: Annotated[float, typer.Option(min=0, max=1, help="Share of visual tokens to save.")] = 0.75,
    average_tokens: Annotated[
        float | None, typer.Option(min=0, help="Average visual tokens per layer, instead of --fewer.")
    ] = None,
    exit_loss: Annotated[
        float, typer.Option(min=0, max=1, help="Accuracy that the exit may cost, without training.")
    ] = 0.02,
    prunes: Annotated[int, typer.Option(min=1, help="Maximum number of boundaries to prune at.")] = 4,
    entry: Boundary = None,
    exit_at: Annotated[int | None, typer.Option("--exit", min=1, help="Boundary to use instead of the rule's.")] = None,
    top: Annotated[float, typer.Option(min=0, max=1, help="K of ILVAS, as a share of the visual tokens.")] = 0.1,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum answer length in tokens.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Measure what each layer does with visual tokens, and write a policy with boundaries that a rule chooses.

    Writes profile.json, profile.png, profile.svg and policy.yaml to --out, all at the end. Finished pieces are stored
    there, so that an interrupted run continues, and several processes share the work. docs/profile.md says what is
    measured and how the rule chooses.
    """
    from dropflow_lab.errors import InputError

    if find_spec("matplotlib") is None:
        raise InputError("the figure is drawn by matplotlib: pip install 'dropflow[figures]'")
    if data == "digits":
        from dropflow_lab.console.commands.digits import require_scikit_learn

        require_scikit_learn()
    check_writable(out)
    from dropflow_lab.inputs.data import read_samples
    from dropflow_lab.inputs.models import load_model
    from dropflow_lab.inputs.prompts import check_questions
    from dropflow_lab.profile import Knobs, Settings
    from dropflow_lab.profile import profile as measure
    from dropflow_lab.profile.write import write_profile
    from dropflow_lab.store.finished import Finished

    with chatter_to_stderr():
        knobs = Knobs(fewer, average_tokens, exit_loss, prunes, entry, exit_at)
        samples = read_samples(data, questions, seed)
        loaded, processor = load_model(model)
        check_questions(processor, samples)
        finished = Finished(out / "finished")
        measured = measure(loaded, processor, samples, Settings(top, batch_size, max_new_tokens), knobs, finished)
        write_profile(measured, out)
    emit(measured.to_json(), as_json, _table(measured), _summary(measured, out))


def _table(measured: Profile) -> Table:
    from rich.table import Table

    from dropflow_lab.profile.profile import mean_ilvas

    what = "accuracy" if measured.dense.accuracy is not None else "agreement"
    table = Table(title=f"{measured.samples} questions; {what} without a policy {measured.dense.score:.1%}")
    columns = ("at", "visual", "text", "cross", "ILVAS", "exit", "enter", "chosen")
    for column in columns:
        table.add_column(column, justify="left" if column == "chosen" else "right")
    curves, choice = measured.curves, measured.choice
    ilvas = mean_ilvas(curves)
    for at in range(measured.layers):
        keep = choice.keep.get(at)
        marks = (
            "enter" if at == choice.entry else "",
            f"keep {keep}" if keep is not None else "",
            "exit" if at == choice.exit else "",
        )
        table.add_row(
            str(at),
            *(
                _value(curve, at)
                for curve in (curves.intra["visual"], curves.intra["instruction"], curves.cross, ilvas)
            ),
            f"{measured.exits[at].score:.1%}",
            f"{measured.entries[at].score:.1%}",
            " ".join(filter(None, marks)),
        )
    return table


def _value(curve: tuple[float | None, ...] | list[float], at: int) -> str:
    value = curve[at] if at < len(curve) else None
    return "" if value is None else f"{value:.3f}"


def _summary(measured: Profile, out: Path) -> str:
    choice = measured.choice
    share = 1 - choice.average_visual_tokens / measured.visual_tokens
    leaves = f"exit at {choice.exit}" if choice.exit < measured.layers else "no exit"
    return (
        f"enter at {choice.entry}, prune at {', '.join(map(str, choice.keep)) or 'none'}, {leaves}: "
        f"{choice.average_visual_tokens:.2f} visual tokens per layer on average ({share:.1%} fewer)\n"
        f"wrote {out / 'policy.yaml'}, profile.json, profile.png and profile.svg"
    )
