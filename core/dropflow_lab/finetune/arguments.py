"""The arguments of the Trainer for a stage of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from dropflow_lab.errors import InputError
from dropflow_lab.finetune.processes import processes
from dropflow_lab.finetune.recipe import PARTS, Recipe, TrainingStage

_ARGUMENTS = TrainingArguments.__dataclass_fields__


def micro_batch(name: str, stage: TrainingStage) -> tuple[int, int]:
    """Return samples per forward, and forwards per step, of each process; raises `InputError` for a rest."""
    count = processes()
    micro = stage.micro_batch or max(1, stage.batch // count)
    if stage.batch % (micro * count):
        raise InputError(
            f"stages.{name}.batch: {stage.batch} samples cannot be divided into forwards of {micro} on {count} "
            "processes; make batch a multiple of micro_batch times the processes"
        )
    return micro, stage.batch // (micro * count)


def arguments_of(recipe: Recipe, name: str, steps: int, folder: Path) -> TrainingArguments:
    """Return the arguments with which a stage of this name trains for `steps` steps, with checkpoints in `folder`."""
    stage = recipe.stages[name]
    micro, accumulation = micro_batch(name, stage)
    more: dict[str, Any] = {}
    if stage.gradient_checkpointing:  # by its newer name, from transformers 5.23 on, where there is one
        kind = next(kind for kind in ("activation", "gradient") if f"{kind}_checkpointing" in _ARGUMENTS)
        more = {f"{kind}_checkpointing": True, f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
    if recipe.parallel == "zero2":
        more["deepspeed"] = {
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
        }
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=stage.optimizer.clip,
        learning_rate=stage.optimizer.rate,
        seed=recipe.seed,
        bf16=recipe.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=recipe.log_every,
        save_steps=recipe.save_every,
        save_total_limit=2,
        report_to="none",
        remove_unused_columns=False,
        train_sampling_strategy="sequential",  # `Epochs` has shuffled
        ddp_find_unused_parameters=any(
            part not in PARTS or part == "vision" or (part == "stages" and recipe.dense is not None)
            for part in stage.train
        ),
        dataloader_pin_memory=torch.cuda.is_available(),
        **more,
    )
