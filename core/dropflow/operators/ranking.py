"""What the text attends to: the query rows, the scores they give to live tokens, and keeping the best tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow.lifecycle.payloads import PruneCall
from dropflow.operators.selection import keep_top
from dropflow.units import Budget


def instruction_scores(call: PruneCall, layer: int | None = None) -> Float[Tensor, "batch slots"]:
    """Mean over heads and instruction tokens of the attention each live token receives.

    `layer` is one that the stage lists in `taps`, by default the one after the boundary. The softmax runs over all
    keys. Instruction tokens are the last one of the prompt or, with labels, the last one before each answer.
    """
    rows = call.attention_rows(call.boundary if layer is None else layer, call.instruction_slots).mean(
        1
    )  # (batch, rows, keys)
    weight = call.instruction_valid.to(rows.dtype)[:, :, None]
    scores = (rows * weight).sum(1) / weight.sum(1).clamp(min=1)
    return scores[:, -call.index.shape[1] :]  # keys of earlier turns come first


def keep_best(call: PruneCall, scores: Float[Tensor, "batch slots"], budget: Budget) -> Bool[Tensor, "batch slots"]:
    """Keep the highest-scored tokens of each image up to its budget, ties to the first.

    Protected tokens always stay and count against the budget. A sample that has no instruction token, such as one
    whose labels are all -100, is not pruned.
    """
    best = keep_top(scores.masked_fill(call.protected, torch.inf), call.image_id, call.counts(budget))
    return best | ~call.instruction_valid.any(1, keepdim=True)


def keep_best_of_videos(
    call: PruneCall, scores: Float[Tensor, "batch slots"], budget: Budget
) -> Bool[Tensor, "batch slots"]:
    """Keep the highest-scored live tokens of each video, over all its frames, up to the budget, ties to the first.

    All tokens of pictures stay. The budget is one of the live tokens; protected ones always stay and count against it.
    For stages with `reads_videos`. A sample that has no instruction token is not pruned.
    """
    video, count = call.video_id, call.video_count
    sizes = torch.zeros(count + 1, dtype=torch.long, device=video.device)
    sizes.index_add_(0, video.flatten() + 1, torch.ones_like(video).flatten())
    best = keep_top(scores.masked_fill(call.protected, torch.inf), video, budget.of_each(sizes[1:]))
    return best | (video < 0) | ~call.instruction_valid.any(1, keepdim=True)


def text_rows(call: PruneCall) -> tuple[Int[Tensor, "batch rows"], Bool[Tensor, "batch rows"]]:
    """Slots of the text tokens after each sample's first visual token, up to its last instruction token.

    The second tensor is false where a sample has fewer of them than the longest. With labels the answer of the last
    round is left out, and a sample without an instruction token has no rows.
    """
    slots = torch.arange(call.index.shape[1], device=call.index.device)
    after = (call.image_id >= 0).cumsum(1) > 0
    last = torch.where(call.instruction_valid, call.instruction_slots, -1).amax(1, keepdim=True)
    text = after & call.text & (slots <= last)
    return columns_of(text, call.most_text)


def columns_of(
    mask: Bool[Tensor, "batch columns"], most: int | None = None
) -> tuple[Int[Tensor, "batch most"], Bool[Tensor, "batch most"]]:
    """Columns where each row is true, in order and padded on the left, and which entries are not padding.

    `most` is an upper bound on how many a row has; without it, the host waits for the device to count them.
    """
    most = int(mask.sum(1).max()) if most is None else most
    columns = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)[:, mask.shape[1] - most :]
    return columns, mask.gather(1, columns)


def row_parts(
    call: PruneCall, layer: int, rows: Int[Tensor, "batch rows"], asks: Bool[Tensor, "batch rows"]
) -> Iterator[Float[Tensor, "batch heads some slots"]]:
    """Attention of `rows` to the slots, in parts far smaller than a map of all slots; zero where `asks` is false."""
    slots, start, heads = call.index.shape[1], 0, 0
    while start < rows.shape[1]:
        step = max(1, slots // (4 * heads)) if heads else 1  # the first row alone gives the number of heads
        own, real = rows[:, start : start + step], asks[:, start : start + step]
        weights = call.attention_rows(layer, own)
        heads, start = weights.shape[1], start + step
        yield weights[..., -slots:] * real[:, None, :, None]
