"""The numbers of a finetuning run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """Steps, sizes and rates; the defaults are those of the first stage of the shipped checkpoints."""

    steps: int = 400
    batch: int = 16
    """Samples per step and process."""
    rate: float = 3e-3
    """Peak learning rate: reached after 20 steps, held for half of the run, then linear down to zero."""
    seed: int = 0
    """Random seed of the order of the samples."""
    save_every: int = 50
    """Steps between resumable checkpoints."""
    log_every: int = 10
    precision: Literal["bf16", "fp32"] = "bf16"
    """`bf16` computes under autocast; weights, gradients and optimiser states are float32 either way."""
    attention: Literal["sdpa", "matmul"] = "sdpa"
    """`matmul` trains with two plain matrix products, whose backward is faster on a CPU."""
