"""`dropflow digits`: train and evaluate the embedded demo model, and sample its questions."""

from __future__ import annotations

import json
from contextlib import nullcontext
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from dropflow_lab.console.commands.options import AsJson, Overrides
from dropflow_lab.console.commands.output import chatter_to_stderr, emit

app = typer.Typer(help="Train and evaluate the embedded demo model, and sample its questions.")


class Split(StrEnum):
    """The splits of the task."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


Seed = Annotated[int, typer.Option(min=0, help="Random seed.")]
Questions = Annotated[int, typer.Option(min=1, help="Number of questions.")]


@app.command("train")
def train(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the checkpoint.")],
    resume: Annotated[bool, typer.Option(help="Continue an interrupted run in the same folder.")] = True,
    seed: Seed = 0,
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads; results are reproducible only with the same number.")
    ] = 1,
    plain: Annotated[
        bool, typer.Option("--plain", help="Never leave visual tokens out; takes the vision tower of `dense`.")
    ] = False,
    clips: Annotated[
        bool, typer.Option("--clips", help="A change of low rank to `dense` instead, for videos of eight small frames.")
    ] = False,
    conversations: Annotated[
        bool, typer.Option("--conversations", help="A change of low rank to `dense` instead, for several questions.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train the model from scratch on the CPU and write a checkpoint."""
    require_scikit_learn()
    from dropflow_lab.compare.clips_accuracy import evaluate_clips
    from dropflow_lab.compare.digits_accuracy import TEST_QUESTIONS, TEST_SEED
    from dropflow_lab.compare.digits_accuracy import evaluate as measure
    from dropflow_lab.digits.training.recipe import PLAIN, Recipe
    from dropflow_lab.digits.training.train import train as run_training
    from dropflow_lab.digits.training.train_change import train_change
    from dropflow_lab.digits.training.train_clips import CHANGE as CLIPS_CHANGE
    from dropflow_lab.digits.training.train_conversations import CHANGE as CONVERSATIONS_CHANGE
    from dropflow_lab.errors import InputError
    from dropflow_lab.files import check_writable

    def test(model: Any, processor: Any) -> str:
        return measure(model, processor, "test", TEST_QUESTIONS, TEST_SEED).to_json()

    if plain + clips + conversations > 1:
        raise InputError("--plain, --clips, --conversations: train different checkpoints; name one of them")
    check_writable(out)
    run: dict[str, Any] = {"seed": seed, "threads": threads, "resume": resume}
    with chatter_to_stderr():
        try:
            if clips:
                folder = train_change(out, CLIPS_CHANGE, **run, test=evaluate_clips)
            elif conversations:
                folder = train_change(out, CONVERSATIONS_CHANGE, **run, test=test)
            else:
                folder = run_training(out, **run, recipe=PLAIN if plain else Recipe(), test=test)
        except ValueError as error:  # the existing run has other settings
            raise InputError(str(error)) from error
    emit({"out": str(folder)}, as_json, f"wrote {folder}")


@app.command("evaluate")
def evaluate(
    questions: Questions = 1000,
    seed: Seed = 0,
    policy: Annotated[str | None, typer.Option(metavar="NAME_OR_PATH", help="Policy to run under.")] = None,
    overrides: Overrides = None,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Checkpoint folder; by default the embedded one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure exact-match accuracy on fresh questions of the test split, overall and per kind."""
    require_scikit_learn()
    import dropflow
    from dropflow.policy.recorded import note_dense
    from dropflow_lab.compare.digits_accuracy import evaluate as measure
    from dropflow_lab.errors import InputError
    from dropflow_lab.inputs.models import load_model

    with chatter_to_stderr():
        if overrides and policy is None:
            raise InputError("--set: there is no policy to override; give --policy")
        chosen = None if policy is None else dropflow.load_policy(policy, overrides or ())
        loaded, processor = load_model(model)
        if chosen is None:
            note_dense(loaded.config)
        with nullcontext() if chosen is None else dropflow.attach(loaded, chosen):
            measured = measure(loaded, processor, "test", questions, seed)
    kinds = json.loads(measured.to_json())
    asked = {"policy": chosen and chosen.name, "questions": questions, "seed": seed, "overall": kinds.pop("overall")}
    emit(asked | {"kinds": kinds}, as_json, measured.table())


@app.command("sample")
def sample(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for images/*.png and data.jsonl.")],
    questions: Questions = 10,
    split: Annotated[Split, typer.Option(help="Which split to draw from.")] = Split.TEST,
    seed: Seed = 0,
    clips: Annotated[bool, typer.Option("--clips", help="Videos, as folders of frames, instead of pictures.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write pictures with questions and answers, for other commands to read."""
    require_scikit_learn()
    from dropflow_lab.digits.data.clip_folder import write_clips
    from dropflow_lab.digits.data.dataset import write_folder
    from dropflow_lab.files import check_writable

    check_writable(out)
    with chatter_to_stderr():
        table = (write_clips if clips else write_folder)(out, split.value, questions, seed)
    emit({"table": str(table), "questions": questions}, as_json, f"wrote {table}")


def require_scikit_learn() -> None:
    """Raise `InputError` if scikit-learn, which the pictures are made from, is not installed."""
    if find_spec("sklearn") is None:
        from dropflow_lab.errors import InputError

        raise InputError("the digits pictures are made from data of scikit-learn: pip install 'dropflow[digits]'")
