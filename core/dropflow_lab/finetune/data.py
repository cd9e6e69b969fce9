"""The samples of a stage: the embedded digits questions, or a folder."""

from __future__ import annotations

from sys import maxsize
from typing import Any

from torch.utils.data import Dataset

from dropflow_lab.digits.data.dialogues import Dialogue, Dialogues
from dropflow_lab.errors import InputError
from dropflow_lab.finetune.folder import FolderDialogues
from dropflow_lab.finetune.recipe import Recipe, TrainingStage
from dropflow_lab.inputs.data import DIGITS, read_samples
from dropflow_lab.inputs.prompts import check_questions


def samples_of(recipe: Recipe, processor: Any) -> dict[str, Dataset[Dialogue]]:
    """Return the samples of every stage by its name; raises `InputError` for data that cannot be trained on."""
    return {name: _samples(stage, recipe.seed, processor) for name, stage in recipe.stages.items()}


def steps_of(stage: TrainingStage, data: Dataset[Dialogue]) -> int:
    """Return the optimizer steps of a stage; a rest of the samples that fills no batch is left out."""
    size: int = len(data)  # type: ignore[arg-type]  # Dataset has no length
    return stage.steps or max(1, (stage.epochs or 1) * size // stage.batch)


def _samples(stage: TrainingStage, seed: int, processor: Any) -> Dataset[Dialogue]:
    if stage.data == DIGITS:
        return Dialogues((stage.steps or 0) * stage.batch, rounds=stage.rounds, seed=seed)
    samples = read_samples(stage.data, maxsize)
    check_questions(processor, samples)
    if filmed := next((sample for sample in samples if sample.videos), None):
        raise InputError(
            f"{filmed.where or stage.data}: has a video, expected pictures alone; training does not state videos, so "
            "name the frames as `images`"
        )
    found = FolderDialogues(samples, stage.rounds)
    if not len(found):
        raise InputError(f"{stage.data}: expected at least one sample")
    return found
