"""The optimizer of a stage and the course of its learning rate, as the Trainer expects them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dropflow_lab.digits.training.optimizers import learning_rate, make_optimizers
from dropflow_lab.finetune.recipe import OptimizerOptions


def make_optimizer(model: Any, options: OptimizerOptions) -> Optimizer:
    """Return the optimizer over the parameters of `model` that require gradients."""
    if options.name == "muon":
        return MuonAdamW(model, options.rate)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(trained, lr=options.rate, betas=options.betas, weight_decay=options.weight_decay)


def make_schedule(optimizer: Optimizer, options: OptimizerOptions, steps: int) -> LambdaLR:
    """Return the learning rate over `steps` steps, as a factor of the peak."""
    warmup = math.ceil(options.warmup * steps if options.warmup < 1 else options.warmup)

    def cosine(done: int) -> float:
        if done < warmup:
            return done / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (done - warmup) / max(1, steps - warmup))

    def hold(done: int) -> float:
        return learning_rate(done, steps, 1.0, warmup=max(1, warmup))

    def constant(done: int) -> float:
        return min(1.0, (done + 1) / max(1, warmup))

    return LambdaLR(optimizer, {"cosine": cosine, "hold": hold, "constant": constant}[options.schedule])


class MuonAdamW(Optimizer):
    """Muon for the trained hidden matrices of `model`, AdamW for everything else; one learning rate for both."""

    def __init__(self, model: Any, rate: float) -> None:
        self.parts = make_optimizers([model])
        groups = list(chain.from_iterable(part.param_groups for part in self.parts))
        for group in groups:
            group["lr"] = rate
        super().__init__([{"params": group["params"]} for group in groups], {"lr": rate})
        self.param_groups = groups  # those of the parts, so that a schedule reaches them

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # no overloads
        """Take one step of both."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = list(chain.from_iterable(part.param_groups for part in self.parts))
