"""Finetuning: a policy is attached, and the Trainer of transformers does the rest."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from os import environ
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import dropflow
from dropflow import Policy
from dropflow_lab.digits.training.attention import use_fast_attention
from dropflow_lab.errors import InputError
from dropflow_lab.files import naming_what_cannot_be_written, replacing_files, write_text
from dropflow_lab.finetune.checkpoints import RestoredWeights, checkpoints, last_whole_checkpoint
from dropflow_lab.finetune.collate import Collator
from dropflow_lab.finetune.optimizer import MuonAdamW, make_schedule
from dropflow_lab.finetune.settings import Settings

_FACTS = "settings.json"
_FREE = ("save_every", "log_every")
"""Settings that a resumed run may change, since no weight depends on them."""


def finetune(
    model: Any,
    processor: Any,
    data: Dataset[Any],
    policy: Policy,
    out: Path,
    settings: Settings,
    *,
    resume: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Train projector and language model through `policy` and write the model to `out`, which is returned.

    The vision tower stays frozen, as in HiDrop. `out/run` holds resumable checkpoints, each a model folder that records
    the policy; `resume` continues from the last whole one, and ends with the same weights as an uninterrupted run, bit
    for bit. A run that was killed before its first checkpoint starts again. The finished model is stored in bf16 if it
    was trained in bf16, together with the log. Under torchrun every process takes its share of each step, and the first
    one writes. `facts` are what a resumed run must share besides policy and settings, such as the source of the data.

    Raises `InputError` if `out` holds a run and `resume` is not set, if it holds none and `resume` is set, or if the
    run has other settings; `PolicyError` for a policy that does not fit the model; `OSError` where a file cannot be
    written.
    """
    run = out / "run"
    own = asdict(settings) | {"policy": policy.to_dict(), "samples": len(data), "processes": _processes()}  # type: ignore[arg-type]  # Dataset has no length
    fixed = {name: value for name, value in own.items() if name not in _FREE} | dict(facts or {})
    last = _start(run, fixed, resume)
    model.get_encoder(modality="image").requires_grad_(False)
    optimizer = MuonAdamW(model.float(), settings.rate)  # folders hold bf16 weights, too coarse for training
    use_cache = vars(model.config).get("use_cache")
    fast = use_fast_attention(model) if settings.attention == "matmul" else nullcontext()
    with dropflow.attach(model, policy, logits="labelled") as flow, fast:
        trainer = Trainer(
            model=model,
            args=_arguments(run, settings),
            train_dataset=data,
            data_collator=Collator(processor),
            processing_class=processor,
            optimizers=(optimizer, make_schedule(optimizer, settings.steps)),
            callbacks=[RestoredWeights(last)] if last else [],
        )
        if trainer.is_world_process_zero():  # the others have read the folder before they meet here
            write_text(run / _FACTS, json.dumps(fixed, indent=2) + "\n")
        with naming_what_cannot_be_written(run), _weights_loaded_elsewhere():
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        flow.record()
    model.config.use_cache = use_cache  # the Trainer turned it off, which generation should not inherit
    if use_cache is None:
        del model.config.use_cache
    if trainer.is_world_process_zero():
        _export(model, processor, out, trainer.state.log_history, settings)
    trainer.accelerator.wait_for_everyone()
    return out


def _start(run: Path, facts: Mapping[str, Any], resume: bool) -> Path | None:
    """Check that a run may start or continue in this folder, and return the checkpoint to continue from."""
    known = run / _FACTS
    if not resume:
        if known.exists() or checkpoints(run):
            raise InputError(f"{run}: holds a run already; continue it with --resume, or train into another folder")
    elif not (known.exists() or checkpoints(run)):
        raise InputError(f"{run}: expected a checkpoint to continue from, found none; leave out --resume")
    else:
        _check_facts(known, json.loads(json.dumps(facts)))
    last, faults = last_whole_checkpoint(run, _processes()) if resume else (None, {})
    if environ.get("RANK", "0") == "0":
        for checkpoint, fault in faults.items():
            print(f"{checkpoint}: skipped; it has {fault}", file=sys.stderr)
        if resume:
            print(f"continuing from {last or 'the beginning: no checkpoint was finished'}", file=sys.stderr)
    return last


def _check_facts(known: Path, facts: Mapping[str, Any]) -> None:
    """Raise `InputError` unless the run was started under the same facts, as far as it recorded them."""
    if not known.exists():
        return  # a run of an older version
    try:
        saved = dict(json.loads(known.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{known}: expected the settings of the run: {error}; delete it if they are the same"
        ) from None
    differing = [name for name in sorted(saved.keys() | facts.keys()) if saved.get(name) != facts.get(name)]
    if differing:
        told = ", ".join(f"{name} (then: {saved.get(name)}, now: {facts.get(name)})" for name in differing)
        raise InputError(f"{known}: --resume keeps a run's settings, but these differ: {told}; use the saved ones")


def _processes() -> int:
    return int(environ.get("WORLD_SIZE", 1))


@contextmanager
def _weights_loaded_elsewhere() -> Iterator[None]:
    """Silence the Trainer's warning about weights it does not find by name; `RestoredWeights` loads them."""
    log, before = logging.getLogger("transformers.trainer"), "keys in the checkpoint model loaded"

    def told(record: logging.LogRecord) -> bool:
        return before not in record.getMessage()

    log.addFilter(told)
    try:
        yield
    finally:
        log.removeFilter(told)


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
    rows = [json.dumps(row) + "\n" for row in log]
    model.to(dtype)
    with replacing_files(out) as part:
        write_text(part / "training-log.jsonl", "".join(rows))
        processor.save_pretrained(part)
        model.save_pretrained(part)
