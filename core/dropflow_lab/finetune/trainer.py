"""The Trainer of transformers with steps without the policy, and with parameters divided by FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.functional import kl_div
from transformers import Trainer

from dropflow import FlowSet
from dropflow_lab.finetune.collate import IGNORED
from dropflow_lab.finetune.optimizer import make_optimizer, make_schedule
from dropflow_lab.finetune.recipe import DenseSteps, OptimizerOptions
from dropflow_lab.finetune.shards import is_sharded, load_whole_state, whole_state, whole_weights

PRUNED, DENSE = "pruned", "dense"
"""Names, in a flow set, of the policy and of none."""


class FlowTrainer(Trainer):  # type: ignore[misc]  # transformers leaves it untyped
    """Trains a model whose weights the caller has restored already, if the run is resumed.

    With `dense`, `flows` are the policies `PRUNED` and `DENSE`: a share of the steps runs on all visual tokens, and
    learns there what the model answers under the policy, too. The idea is that of DualSpeed's slow mode; its mode
    tokens, which tell the model which mode it is in, are not part of it.
    """

    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        *,
        optimizer: OptimizerOptions,
        flows: FlowSet | None = None,
        dense: DenseSteps | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self._options, self._flows, self._dense = optimizer, flows, dense
        self._sharded = is_sharded(self.model)
        if self._sharded:  # accelerate would wrap the model in DistributedDataParallel
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = lambda model, **_: prepare(
                model, device_placement=False, evaluation_mode=True
            )

    def create_optimizer(self, model: Any = None) -> Any:
        """Return the optimizer of the stage; one given to the Trainer would be lost under DeepSpeed."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model if model is None else model, self._options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the schedule of the stage, for the same reason."""
        if self.lr_scheduler is None:
            self.lr_scheduler = make_schedule(optimizer or self.optimizer, self._options, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the model's own loss; in a dense step, with the divergence from its answers under the policy."""
        if self._flows is None or self._dense is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not is_dense(self.state.global_step, self._dense.share):
            with self._flows.using(PRUNED):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self._flows.using(PRUNED), torch.no_grad():
            taught = _answers(model(**inputs).logits, inputs["labels"])
        with self._flows.using(DENSE):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        given = _answers(outputs.logits, inputs["labels"])
        apart = kl_div(given.log_softmax(-1), taught.log_softmax(-1), reduction="sum", log_target=True)
        if num_items_in_batch is None:
            apart = apart / len(given)
        else:  # as the Trainer scales the model's loss: by the labels of all processes, whose gradients are averaged
            apart = apart / num_items_in_batch * self.accelerator.num_processes
        loss = loss + self._dense.distill * apart
        return (loss, outputs) if return_outputs else loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: the weights are restored before the Trainer is made, which may know them by other names."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model, gathered from all processes where it is divided among them."""
        if not self._sharded:
            super().save_model(output_dir, _internal_call)
            return
        weights = whole_weights(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        read = {name: torch.load(Path(checkpoint) / f"{name}.pt", weights_only=True) for name in _STATES}
        load_whole_state(self.optimizer, read["optimizer"])
        self.lr_scheduler.load_state_dict(read["scheduler"])

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


_STATES = ("optimizer", "scheduler")


def is_dense(step: int, share: float) -> bool:
    """Whether the step with this number, from 0, is one of the evenly spread `share` of dense steps."""
    return int((step + 1) * share) > int(step * share)


def _answers(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the logits (labels, vocabulary) that predict a label, in float32."""
    return logits[:, :-1][labels[:, 1:] != IGNORED].float()
