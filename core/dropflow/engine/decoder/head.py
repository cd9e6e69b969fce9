"""Runs the LM head and the loss only on positions that predict a label, for callers who ask for no other logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow.engine.tokens.live_set import LiveSet


def live_states(
    hidden: Float[Tensor, "batch slots dim"], live: LiveSet, wanted: Bool[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, "1 rows dim"], Int[Tensor, "batch tokens"]]:
    """The states needed to read all `wanted` positions, without duplicates, and the row that each position reads.

    Rows are the live tokens of all samples in order. A position reads the last live token at or before it; its row is
    -1 if there is none or the position is not wanted.
    """
    slot = live.slot.to(hidden.device)
    used = torch.zeros(live.index.shape, dtype=torch.bool, device=hidden.device)
    used.scatter_(1, slot.clamp(min=0), (slot >= 0) & wanted)
    number = used.flatten().long().cumsum(0).view(used.shape) - 1
    rows = torch.where((slot >= 0) & wanted, number.gather(1, slot.clamp(min=0)), -1)
    return hidden[used][None], rows


def loss_of_rows(
    loss_function: Callable[..., Tensor],
    logits: Float[Tensor, "1 rows vocabulary"],
    rows: Int[Tensor, "batch tokens"],
    labels: Int[Tensor, "batch tokens"],
    **arguments: Any,
) -> Tensor:
    """The model's own loss of `logits` (one row per live token), for labels given per logical token.

    Position t predicts the label at t + 1 from its row. A label whose position has no live token at or before it is
    predicted by zero logits. `arguments` are those of `loss_function` besides.
    """
    rows, targets = rows.to(logits.device), shifted(labels).to(logits.device)
    asked = targets != -100
    index = rows[asked]
    picked = logits[0]
    if not torch.equal(index, torch.arange(len(picked), device=index.device)):  # copied only where rows are shared
        picked = picked[index.clamp(min=0)].masked_fill((index < 0)[:, None], 0)
    return loss_function(logits=picked[None], labels=None, shift_labels=targets[asked][None], **arguments)


def shifted(labels: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """The label that each position predicts: that of the next position, and -100 (ignored) for the last one."""
    return torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
