"""Stating the instruction tokens: those whose attention ranks, where the call itself cannot tell which they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from dropflow.errors import UnsupportedCall

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor

_stated: ContextVar[Tensor | None] = ContextVar("dropflow_instruction", default=None)


@contextmanager
def instruction_tokens(
    mask: Bool[Tensor, "batch tokens"] | None = None, *, labels: Int[Tensor, "batch tokens"] | None = None
) -> Iterator[None]:
    """State which tokens ask in the prompts that this thread runs inside the block.

    `mask` is true for them. With `labels` instead, the last token before every labelled span asks (-100 is not
    labelled), as in a call that is given these labels: for trainers that take the labels out of the call, as a Trainer
    does for `compute_loss_func` and label smoothing. A sample in which no token asks is not pruned by stages that rank.

    Columns are those of the call, or all tokens seen on its cache where a prompt is fed in several calls. Where
    `generate` repeats samples, as for beams, each row applies to all copies. Padding never asks. A thread started
    inside the block does not see the statement. Raises `UnsupportedCall` unless exactly one of the two is given, with
    two dimensions.
    """
    import torch

    given = mask if labels is None else labels
    if (mask is None) == (labels is None) or not isinstance(given, torch.Tensor) or given.dim() != 2:
        raise UnsupportedCall("instruction_tokens: expected either a mask or `labels`, a tensor (batch, tokens)")
    if labels is not None:
        mask = before_labels(labels)
    elif given.dtype != torch.bool:
        raise UnsupportedCall(f"instruction_tokens: expected a torch.bool mask, got {given.dtype}; compare it first")
    token = _stated.set(mask)
    try:
        yield
    finally:
        _stated.reset(token)


def before_labels(labels: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    """The last token before every labelled span, so one per round (HiDrop, section 3.2)."""
    import torch

    return torch.nn.functional.pad((labels[:, :-1] == -100) & (labels[:, 1:] != -100), (0, 1))


def stated_instruction() -> Bool[Tensor, "batch tokens"] | None:
    """The mask that this thread states; `None` if it states none."""
    return _stated.get()
