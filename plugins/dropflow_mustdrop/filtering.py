"""The maths of the dual-attention filter, on what the text attends to (MustDrop, section on the prefilling stage)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def attention_scores(
    weights: Iterable[Float[Tensor, "batch heads rows keys"]],
) -> tuple[Float[Tensor, "batch keys"], Float[Tensor, "batch keys"]]:
    """Global score (sum over text rows) and individual score (maximum) of head-averaged attention, from parts of rows.

    Rows that are no text of the sample must be zero. Raises `ValueError` when there is no part at all.
    """
    total: Tensor | None = None
    largest: Tensor | None = None
    for part in weights:
        mean = part.mean(1)
        sums, peaks = mean.sum(1), mean.amax(1)
        total = sums if total is None else total + sums
        largest = peaks if largest is None else torch.maximum(largest, peaks)
    if total is None or largest is None:
        raise ValueError("expected attention of at least one part of rows, got none")
    return total, largest


def block_totals(
    global_scores: Float[Tensor, "batch slots"], visual: Bool[Tensor, "batch slots"]
) -> Float[Tensor, "batch slots"]:
    """Sum of the global scores over each slot's block, a run of visual slots without text in between; 0 for text.

    The tiles of one picture are one block and share one total, as published; pictures with text in between do not, so
    that a threshold means for each of them what it means alone.
    """
    block = blocks(visual)
    scores = torch.where(visual, global_scores, 0)
    most = (block.shape[1] + 1) // 2  # runs that fit into a row: their number is on the device
    sums = scores.new_zeros(len(scores), most + 1).scatter_add(1, block, scores)
    return torch.where(visual, sums.gather(1, block), 0)


def blocks(visual: Bool[Tensor, "batch slots"]) -> Int[Tensor, "batch slots"]:
    """Number, from 1, of the run of visual slots that each slot belongs to; 0 for text."""
    starts = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    return starts.long().cumsum(1) * visual


def dual_keep(
    global_scores: Float[Tensor, "batch slots"],
    individual_scores: Float[Tensor, "batch slots"],
    totals: Float[Tensor, "batch slots"],
    global_threshold: float,
    individual_threshold: float,
) -> Bool[Tensor, "batch slots"]:
    """Keep what reaches either threshold: drop iff G < global_threshold * total and M < individual_threshold."""
    ignored = global_scores < global_threshold * totals
    return ~(ignored & (individual_scores < individual_threshold))


def dual_ranking(
    global_scores: Float[Tensor, "batch slots"],
    individual_scores: Float[Tensor, "batch slots"],
    totals: Float[Tensor, "batch slots"],
    global_threshold: float,
    individual_threshold: float,
) -> Float[Tensor, "batch slots"]:
    """The factor on both thresholds up to which a token is kept: the larger of both scores over its threshold.

    The tokens that `dual_keep` keeps are those from 1 on, so that the best k are those a common factor would leave.
    Both thresholds must be positive.
    """
    tiny = torch.finfo(global_scores.dtype).tiny
    share = global_scores / (global_threshold * totals).clamp(min=tiny)
    return torch.maximum(share, individual_scores / individual_threshold)
