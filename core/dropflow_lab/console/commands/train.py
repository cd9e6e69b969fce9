"""`dropflow train`: finetune a model through a policy."""

from __future__ import annotations

from enum import StrEnum
from importlib.util import find_spec
from os import environ
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dropflow_lab.console.commands.digits import require_scikit_learn
from dropflow_lab.console.commands.options import AsJson, Overrides
from dropflow_lab.console.commands.output import chatter_to_stderr, emit
from dropflow_lab.files import check_writable

if TYPE_CHECKING:
    from dropflow import Policy
    from dropflow_lab.finetune.recipe import Recipe


class Precision(StrEnum):
    """Precision that a step is computed in."""

    BF16 = "bf16"
    FP32 = "fp32"


class Attention(StrEnum):
    """How attention is computed while training."""

    SDPA = "sdpa"
    MATMUL = "matmul"


def train(
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the trained model; checkpoints are kept in DIR/run.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(metavar="NAME_OR_PATH", help="Stages of training; the options below change all of them.")
    ] = "digits",
    policy: Annotated[
        str | None, typer.Option(metavar="NAME_OR_PATH", help="Policy to train through; by default the recipe's.")
    ] = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR_OR_NAME", help="Model folder, or name of a model in the local cache."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="digits|DIR", help="The embedded questions, or a folder with images/ and a .jsonl file."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples per step, over all processes.")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Questions per picture, each trained as if asked alone.")
    ] = None,
    rate: Annotated[float | None, typer.Option(min=0, help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Random seed of pictures and questions.")] = None,
    save_every: Annotated[int | None, typer.Option(min=1, help="Steps between resumable checkpoints.")] = None,
    precision: Annotated[Precision | None, typer.Option(help="bf16 computes under autocast.")] = None,
    attention: Annotated[
        Attention | None, typer.Option(help="matmul: two plain matrix products, whose backward is faster on a CPU.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in DIR.")] = False,
    only_check: Annotated[bool, typer.Option("--check", help="Check recipe and policy, and train nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Finetune a model through a policy on questions about pictures, with the Trainer of transformers.

    The output is a model folder that records the policy: `dropflow.attach(model)` picks it up. The default recipe is
    that of the embedded dense model. With several processes: `torchrun --nproc-per-node 2 --no-python dropflow train`.
    """
    from dropflow_lab.finetune.recipe_file import load_recipe

    given = {
        "model": model,
        "policy": policy,
        "seed": seed,
        "save_every": save_every,
        "precision": precision and precision.value,
        "attention": attention and attention.value,
    }
    every = {"data": data, "batch": batch, "rounds": rounds, "steps": steps}
    changes = {name: value for name, value in given.items() if value is not None}
    stages: dict[str, Any] = {name: value for name, value in every.items() if value is not None}
    stages |= {} if steps is None else {"epochs": None}
    stages |= {} if rate is None else {"optimizer": {"rate": rate}}
    with chatter_to_stderr():
        chosen = load_recipe(recipe, changes | {"stages": stages})
        through = _policy(chosen, overrides)
        if only_check:
            stated = {name: stage.steps for name, stage in chosen.stages.items()}
            emit({"recipe": chosen.name, "policy": through.name, "steps": stated}, as_json, f"{chosen.name}: valid")
            return
        folder, taken = _train(chosen, through, out, resume)
    if environ.get("RANK", "0") == "0":
        emit({"out": str(folder), "policy": through.name, "steps": taken}, as_json, f"wrote {folder}")


def _policy(recipe: Recipe, overrides: list[str] | None) -> Policy:
    """Return the policy to train through."""
    from dropflow import load_policy
    from dropflow_lab.errors import InputError

    if recipe.policy is None:
        raise InputError(f"policy: the recipe {recipe.name} names none; give --policy")
    return load_policy(recipe.policy, overrides or ())


def _train(recipe: Recipe, policy: Policy, out: Path | None, resume: bool) -> tuple[Path, int]:
    """Train, and return the folder and the number of steps."""
    from dropflow_lab.errors import InputError

    if out is None:
        raise InputError("--out: missing; name a folder for the trained model")
    check_writable(out)
    require_accelerate()
    if any(stage.data == "digits" for stage in recipe.stages.values()):
        require_scikit_learn()
    if recipe.parallel == "zero2" and find_spec("deepspeed") is None:
        raise InputError("parallel: zero2 needs DeepSpeed: pip install deepspeed")
    import torch

    from dropflow_lab.finetune.data import samples_of, steps_of
    from dropflow_lab.finetune.train import finetune
    from dropflow_lab.inputs.models import load_model

    if torch.cuda.is_available():  # otherwise every process would load its model onto the first GPU
        torch.cuda.set_device(int(environ.get("LOCAL_RANK", 0)))
    model, processor = load_model(None if recipe.model is None else Path(recipe.model))
    data = samples_of(recipe, processor)
    finetune(model, processor, recipe, data, policy, out, resume=resume)
    return out, sum(steps_of(stage, data[name]) for name, stage in recipe.stages.items())


def require_accelerate() -> None:
    """Raise `InputError` if accelerate, which the Trainer of transformers needs, is not installed."""
    if find_spec("accelerate") is None:
        from dropflow_lab.errors import InputError

        raise InputError("the Trainer of transformers needs accelerate: pip install 'dropflow[train]'")
