"""Muon for the hidden matrices, AdamW for everything else, and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn, optim
from torch.optim import Optimizer


def make_optimizers(modules: Iterable[nn.Module]) -> list[Optimizer]:
    """Return the two optimisers over the trainable parameters of `modules`.

    Muon takes the weights of linear layers; embeddings, norms, biases, convolutions and weights of any
    module called `head` go to AdamW. Raises `RuntimeError` for torch before 2.9, which has no Muon.
    """
    if not hasattr(optim, "Muon"):
        raise RuntimeError(f"training the demo model needs torch 2.9 or later, got {torch.__version__}")
    hidden: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                is_hidden = parameter.ndim == 2 and "embed" not in name and "head" not in name
                (hidden if is_hidden else others).append(parameter)
    return [
        optim.Muon(hidden, lr=0.0, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def step(optimizers: list[Optimizer], learning_rate: float, clip: float = 1.0) -> None:
    """Clip the gradients to the joint norm `clip`, update, and clear them."""
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def learning_rate(index: int, steps: int, peak: float, *, warmup: int = 40, hold: float = 0.5) -> float:
    """Return the rate at step `index`: linear warm-up, `peak` up to the share `hold`, then linear to zero."""
    rising = min(1.0, (index + 1) / min(warmup, max(1, steps)))
    falling = min(1.0, (steps - index) / max(1.0, steps * (1 - hold)))
    return peak * min(rising, falling)
