"""`dropflow train`: finetune a model through a policy."""

from __future__ import annotations

from enum import StrEnum
from importlib.util import find_spec
from os import environ
from pathlib import Path
from sys import maxsize
from typing import Annotated

import typer

from dropflow_lab.console.commands.digits import require_scikit_learn
from dropflow_lab.console.commands.options import AsJson, Data, ModelOption, Overrides
from dropflow_lab.console.commands.output import chatter_to_stderr, emit
from dropflow_lab.files import check_writable


class Precision(StrEnum):
    """Precision that a step is computed in."""

    BF16 = "bf16"
    FP32 = "fp32"


class Attention(StrEnum):
    """How attention is computed while training."""

    SDPA = "sdpa"
    MATMUL = "matmul"


def train(
    policy: Annotated[str, typer.Option(metavar="NAME_OR_PATH", help="Policy to train through.")],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the trained model; checkpoints are kept in DIR/run.")
    ],
    overrides: Overrides = None,
    model: ModelOption = None,
    data: Data = "digits",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 400,
    batch: Annotated[int, typer.Option(min=1, help="Pictures per step and process.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Questions per picture, each trained as if asked alone.")] = 12,
    rate: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of pictures and questions.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between resumable checkpoints.")] = 50,
    precision: Annotated[Precision, typer.Option(help="bf16 computes under autocast.")] = Precision.BF16,
    attention: Annotated[
        Attention, typer.Option(help="matmul: two plain matrix products, whose backward is faster on a CPU.")
    ] = Attention.SDPA,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in DIR.")] = False,
    as_json: AsJson = False,
) -> None:
    """Finetune a model through a policy on questions about pictures, with the Trainer of transformers.

    Projector and language model are trained, with Muon and AdamW. The output is a model folder that records the policy:
    `dropflow.attach(model)` picks it up. The defaults suit the embedded dense model. With several processes: `torchrun
    --nproc-per-node 2 --no-python dropflow train ...`.
    """
    require_accelerate()
    from dropflow import load_policy
    from dropflow_lab.digits.data.dialogues import Dialogues
    from dropflow_lab.finetune import FolderDialogues, Settings, finetune
    from dropflow_lab.inputs.data import DIGITS, read_samples
    from dropflow_lab.inputs.models import load_model
    from dropflow_lab.inputs.prompts import check_questions

    if data == DIGITS:
        require_scikit_learn()

    with chatter_to_stderr():
        check_writable(out)
        chosen = load_policy(policy, overrides or ())
        loaded, processor = load_model(model)
        settings = Settings(steps, batch, rate, seed, save_every, precision=precision.value, attention=attention.value)
        dialogues: Dialogues | FolderDialogues
        if data == DIGITS:
            dialogues = Dialogues(steps * batch * int(environ.get("WORLD_SIZE", 1)), rounds=rounds, seed=seed)
        else:
            samples = read_samples(data, maxsize)
            check_questions(processor, samples)
            dialogues = FolderDialogues(samples, rounds)
        facts = {"rounds": rounds, "data": data if data == DIGITS else "a folder"}
        folder = finetune(loaded, processor, dialogues, chosen, out, settings, resume=resume, facts=facts)
    if environ.get("RANK", "0") == "0":
        emit({"out": str(folder), "policy": chosen.name, "steps": steps}, as_json, f"wrote {folder}")


def require_accelerate() -> None:
    """Raise `InputError` if accelerate, which the Trainer of transformers needs, is not installed."""
    if find_spec("accelerate") is None:
        from dropflow_lab.errors import InputError

        raise InputError("the Trainer of transformers needs accelerate: pip install 'dropflow[train]'")
