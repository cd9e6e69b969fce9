"""Finetuning by a recipe: stage by stage a policy is attached, and the Trainer of transformers does the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from os import environ
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.utils.data import Dataset

import dropflow
from dropflow import Flow, FlowSet, Policy
from dropflow.policy.recorded import WEIGHTS
from dropflow_lab.digits.data.dialogues import Dialogue
from dropflow_lab.digits.training.attention import use_fast_attention
from dropflow_lab.errors import InputError
from dropflow_lab.files import naming_what_cannot_be_written, replacing_files, write_text
from dropflow_lab.finetune.arguments import arguments_of, micro_batch
from dropflow_lab.finetune.checkpoints import last_whole_checkpoint, load_weights
from dropflow_lab.finetune.collate import Collator, packing_fault
from dropflow_lab.finetune.data import steps_of
from dropflow_lab.finetune.epochs import Epochs
from dropflow_lab.finetune.parts import train_parts
from dropflow_lab.finetune.processes import is_first, meet, processes
from dropflow_lab.finetune.recipe import Recipe
from dropflow_lab.finetune.settings import check_start, settings_of, tell, write_settings
from dropflow_lab.finetune.shards import is_sharded, shard
from dropflow_lab.finetune.stages import StageProgress, stages_in_float32, write_learned
from dropflow_lab.finetune.trainer import DENSE, PRUNED, FlowTrainer


def finetune(
    model: Any,
    processor: Any,
    recipe: Recipe,
    data: Mapping[str, Dataset[Dialogue]],
    policy: Policy,
    out: Path,
    *,
    resume: bool = False,
) -> Path:
    """Train `model` through `policy`, stage by stage, and write it to `out`, which is returned.

    `data` holds the samples of every stage. `out/run/STAGE` holds its resumable checkpoints, each a model folder that
    records the policy; `resume` continues from the last whole one, and ends with the same weights as an uninterrupted
    run, bit for bit. A stage that was killed before its first checkpoint starts again. The finished model is stored in
    bf16 if it was trained in bf16, together with the log and, where options can say what the policy's stages have
    learned, with a plain policy. Under torchrun every process takes its share of each step, and the first one writes.

    Raises `InputError` if `out` holds a run and `resume` is not set, if it holds none and `resume` is set, or if the
    run has other settings, and for a recipe that does not fit the model or the number of processes; `PolicyError` for
    a policy that does not fit the model; `OSError` where a file cannot be written.
    """
    run = out / "run"
    _check(model, recipe)
    settings = settings_of(recipe, policy, data)
    check_start(run, settings, resume)
    meet()  # before the first process writes what the others have just looked for
    use_cache = vars(model.config).get("use_cache")
    log: list[dict[str, Any]] = []
    before: Path | None = None
    for name, stage in recipe.stages.items():
        steps, own = steps_of(stage, data[name]), run / name
        last, faults = last_whole_checkpoint(own, processes()) if resume else (None, {})
        if last is not None and last.name == f"checkpoint-{steps}" and name != list(recipe.stages)[-1]:
            log += _logged(name, json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["log_history"])
            before = last
            continue
        if resume:
            tell(own, last, faults)
        samples = Epochs(data[name], steps * stage.batch, recipe.seed)
        with naming_what_cannot_be_written(run):
            model, history = _train(
                model, processor, recipe, name, samples, policy, own, (before, last), (run, settings)
            )
        meet()  # the next stage reads what the first process writes
        log += _logged(name, history)
        before, resume = own / f"checkpoint-{steps}", False
    if use_cache is None:
        vars(model.config).pop("use_cache", None)
    else:
        model.config.use_cache = use_cache  # the Trainer turned it off, which generation should not inherit
    if is_first():
        with _with_learned(model, policy, recipe, before) as flow:
            _export(model, processor, flow, out, log, before, recipe)
    meet()
    return out


def _train(
    model: Any,
    processor: Any,
    recipe: Recipe,
    name: str,
    samples: Epochs,
    policy: Policy,
    folder: Path,
    checkpoint: tuple[Path | None, Path | None],
    settings: tuple[Path, Mapping[str, Any]],
) -> tuple[Any, list[dict[str, Any]]]:
    """Run one stage; `checkpoint` names that of the stage before, and that of this stage to continue from.

    Returns the trained model, which is another object if the one given had been divided among processes, and the log.
    """
    before, last = checkpoint
    stage = recipe.stages[name]
    steps = len(samples) // stage.batch
    arguments = arguments_of(recipe, name, steps, folder)
    device = arguments.device  # where processes meet that have not yet, after each has looked into the folder
    weights = last or before
    if weights is not None and is_sharded(model):
        model = type(model).from_pretrained(weights, dtype=torch.float32, local_files_only=True)
    else:
        model = model.float()  # folders hold bf16 weights, too coarse for training
        if weights is not None:
            load_weights(model, weights)
    model.train()
    train_parts(model, stage.train, f"stages.{name}.train")
    if recipe.parallel == "fsdp2":
        shard(model.to(device), device)
    fast = use_fast_attention(model) if recipe.attention == "matmul" else nullcontext()
    with _attached(model, policy, recipe, weights) as (flow, flows), fast:
        train_parts(model, stage.train, f"stages.{name}.train")  # again, with the modules of the policy's stages
        write_settings(*settings)  # before the Trainer makes a folder, which would look like a run
        trainer = FlowTrainer(
            flows=flows,
            dense=recipe.dense,
            model=model,
            args=arguments,
            train_dataset=samples,
            data_collator=Collator(processor),
            processing_class=processor,
            optimizer=stage.optimizer,
            callbacks=[StageProgress(flow)],
        )
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if stage.gradient_checkpointing:
        model._set_gradient_checkpointing(enable=False)  # the Trainer leaves it on
    trainer.accelerator.free_memory()
    return model, trainer.state.log_history


@contextmanager
def _attached(
    model: Any, policy: Policy, recipe: Recipe, weights: Path | None
) -> Iterator[tuple[Flow, FlowSet | None]]:
    """Attach the policy while the block runs, and record it in the model's config unless the model is to run dense.

    What its stages have learned before is read from the folder `weights`. A policy with such stages is recorded where
    the model is saved, as their weights leave the model with it.
    """
    if recipe.dense is not None:
        with dropflow.attach_set(model, {PRUNED: policy, DENSE: None}, default=DENSE) as flows:
            pruned = flows[PRUNED]
            assert pruned is not None
            if pruned.modules and weights is not None:
                pruned.load_stages(weights)
            yield pruned, flows
        return
    with dropflow.attach(model, policy, logits=recipe.logits) as flow:
        if flow.modules and weights is not None:
            flow.load_stages(weights)
        yield flow, None
        if not flow.modules:
            flow.record()


@contextmanager
def _with_learned(model: Any, policy: Policy, recipe: Recipe, weights: Path | None) -> Iterator[Flow | None]:
    """Attach the policy with what its stages have learned, if anything; a model that is to run dense records none."""
    if weights is None or not (weights / WEIGHTS).is_file():
        yield None
    elif recipe.dense is not None:
        with dropflow.attach_set(model, {PRUNED: policy, DENSE: None}, default=DENSE, weights=weights) as flows:
            yield flows[PRUNED]
    else:
        with dropflow.attach(model, policy, weights=weights) as flow:
            yield flow


def _check(model: Any, recipe: Recipe) -> None:
    """Raise `InputError` where a recipe does not fit the model or the number of processes."""
    for name, stage in recipe.stages.items():
        micro_batch(name, stage)
        train_parts(model, stage.train, f"stages.{name}.train")
        fault = packing_fault(dropflow.backbone_for(model)) if stage.rounds > 1 else None
        if fault:
            raise InputError(
                f"stages.{name}.rounds: {stage.rounds} rounds cannot be packed for this model: {fault}; set 1"
            )
    if recipe.parallel != "ddp" and "RANK" not in environ and not distributed.is_initialized():
        raise InputError(
            f"parallel: {recipe.parallel} needs processes started by torchrun, such as `torchrun --nproc-per-node 2 "
            "--no-python dropflow train ...`; or set ddp"
        )


def _logged(stage: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"stage": stage, **row} for row in rows]


def _export(
    model: Any,
    processor: Any,
    flow: Flow | None,
    out: Path,
    log: list[dict[str, Any]],
    last: Path | None,
    recipe: Recipe,
) -> None:
    if is_sharded(model):
        whole = type(model).from_pretrained(last, dtype=torch.float32, local_files_only=True)
        whole.config, whole.generation_config = model.config, model.generation_config
        model = whole
    with stages_in_float32(flow):
        model.to(torch.bfloat16 if recipe.precision == "bf16" else torch.float32)
    with replacing_files(out) as part:
        write_text(part / "training-log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
        processor.save_pretrained(part)
        model.save_pretrained(part)
        write_learned(flow, part)
