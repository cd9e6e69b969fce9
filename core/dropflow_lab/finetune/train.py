"""Finetuning: a policy is attached, and the Trainer of transformers does the rest."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import dropflow
from dropflow import Policy
from dropflow_lab.digits.training.attention import use_fast_attention
from dropflow_lab.errors import InputError
from dropflow_lab.finetune.collate import Collator
from dropflow_lab.finetune.optimizer import MuonAdamW, make_schedule
from dropflow_lab.finetune.settings import Settings


def finetune(
    model: Any,
    processor: Any,
    data: Dataset[Any],
    policy: Policy,
    out: Path,
    settings: Settings,
    *,
    resume: bool = False,
) -> Path:
    """Train projector and language model through `policy` and write the model to `out`, which is returned.

    The vision tower stays as it is, as in HiDrop. `out/run` holds resumable checkpoints, each a model folder that
    records the policy; `resume` continues from the last one, and ends with the weights the run would have had. The
    finished model is stored in bf16 where the computation was, with the log beside it. Under torchrun every process
    takes its share of the steps, and the first one writes.

    Raises `InputError` if `out` holds a run and `resume` is not set, or none and it is; `PolicyError` for a policy that
    does not fit the model.
    """
    last = _last_checkpoint(out / "run", resume)
    model.get_encoder(modality="image").requires_grad_(False)
    optimizer = MuonAdamW(model.float(), settings.rate)  # folders hold bf16 weights, too coarse to be trained
    use_cache = vars(model.config).get("use_cache")
    fast = use_fast_attention(model) if settings.attention == "matmul" else nullcontext()
    with dropflow.attach(model, policy) as flow, fast:
        trainer = Trainer(
            model=model,
            args=_arguments(out / "run", settings),
            train_dataset=data,
            data_collator=Collator(processor),
            processing_class=processor,
            optimizers=(optimizer, make_schedule(optimizer, settings.steps)),
        )
        trainer.train(resume_from_checkpoint=last)
        flow.record()
    model.config.use_cache = use_cache  # the Trainer turned it off, which generation should not inherit
    if use_cache is None:
        del model.config.use_cache
    if trainer.is_world_process_zero():
        _export(model, processor, out, trainer.state.log_history, settings)
    trainer.accelerator.wait_for_everyone()
    return out


def _last_checkpoint(run: Path, resume: bool) -> str | None:
    last = get_last_checkpoint(str(run)) if run.is_dir() else None
    if last is not None and not resume:
        raise InputError(f"{run}: holds a run already; continue it with --resume, or train into another folder")
    if last is None and resume:
        raise InputError(f"{run}: expected a checkpoint to continue from, found none; leave out --resume")
    return last


def _arguments(run: Path, settings: Settings) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(run),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.rate,
        seed=settings.seed,
        bf16=settings.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=settings.log_every,
        save_steps=settings.save_every,
        save_total_limit=2,
        report_to="none",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _export(model: Any, processor: Any, out: Path, log: list[dict[str, Any]], settings: Settings) -> None:
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    model.to(dtype).save_pretrained(out)
    processor.save_pretrained(out)
    rows = [json.dumps(row) + "\n" for row in log]
    (out / "training-log.jsonl").write_text("".join(rows), encoding="utf-8")
    for file in out.iterdir():
        if file.is_file():
            file.chmod(0o644)  # safetensors writes its file with mode 0600
