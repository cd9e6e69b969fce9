"""Muon and AdamW as one optimiser with one schedule, as the Trainer expects."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dropflow_lab.digits.training.optimizers import learning_rate, make_optimizers

_WARMUP = 20


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


def make_schedule(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Return the schedule of the dense checkpoint: linear warm-up, the peak for half of the steps, linear decay."""
    return LambdaLR(optimizer, lambda done: learning_rate(done, steps, 1.0, warmup=_WARMUP))
