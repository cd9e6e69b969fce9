"""The rules of VisionPulse: how many visual entries a decode step reads, and which; each sample by itself.

`logits` are what the softmax of the new token gets, float32, and `visual` the entries that may be parked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """Which share of its visual entries a step reads."""

    tau: float
    """Temperature of the softmax that gives the mass."""
    least: float
    """Lower bound of a share that follows from the mass."""
    most: float
    """Upper bound of it."""
    fixed: float | None = None
    """The share itself, whatever the mass."""

    def share(self, mass: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """The share for each sample."""
        return mass.clamp(self.least, self.most) if self.fixed is None else torch.full_like(mass, self.fixed)


def by_mass(
    logits: Float[Tensor, "batch heads keys"], visual: Bool[Tensor, "batch keys"], budget: Budget
) -> Bool[Tensor, "batch keys"]:
    """The official rule: as large a share as vision has of the sharpest head's attention, ranked by mean logits.

    At least one entry where there is any; the product of share and number is cut off in float32.
    """
    mass = _mass((logits / budget.tau).softmax(2), visual)
    counts = (budget.share(mass) * visual.sum(1).float()).trunc().long().clamp(min=1)
    return _best(logits.mean(1), visual, counts)


def by_importance(
    logits: Float[Tensor, "batch heads keys"],
    visual: Bool[Tensor, "batch keys"],
    budget: Budget,
    top_p: float | None = None,
) -> Bool[Tensor, "batch keys"]:
    """The rule of the other public port, ranked by mean probabilities at the temperature.

    The number follows from the mass, rounded up; with `top_p` it is the smallest that holds this share of the visual
    importance; a fixed share is rounded half to even. All lie between the bounds of the budget.
    """
    weights = (logits / budget.tau).softmax(2)
    importance, total = weights.mean(1), visual.sum(1).float()
    if budget.fixed is not None:
        counts = (budget.fixed * total).round()
    elif top_p is not None:
        ranked = importance.masked_fill(~visual, 0.0).sort(dim=1, descending=True).values.cumsum(1)
        counts = (ranked < top_p * ranked[:, -1:]).sum(1) + 1.0
    else:
        counts = (_mass(weights, visual) * total).ceil()
    low, high = (budget.least * total).ceil().clamp(min=1), (budget.most * total).floor().clamp(min=1)
    return _best(importance, visual, counts.maximum(low).minimum(high).long())


def by_block(
    logits: Float[Tensor, "batch heads keys"],
    visual: Bool[Tensor, "batch keys"],
    valid: Bool[Tensor, "batch keys"],
    budget: Budget,
    size: int,
) -> Bool[Tensor, "batch keys"]:
    """The rule for blocks of `size` neighbouring entries, padding not counted: only wholly visual blocks are parked."""
    block = ((valid.cumsum(1) - 1) // size).clamp(min=0)
    blocks = (logits.shape[2] + size - 1) // size
    prunable = torch.zeros_like(block[:, :1]).repeat(1, blocks).scatter_add(1, block, visual.long()) == size
    best = logits.new_full((*logits.shape[:2], blocks), -torch.inf)
    own = (logits / budget.tau).masked_fill(~valid[:, None], -torch.inf)
    best = best.scatter_reduce(2, block[:, None].expand_as(own), own, "amax")
    chosen = best_blocks(best.softmax(2), prunable, visual.sum(1), budget, size)
    return (chosen | ~prunable).gather(1, block)


def best_blocks(
    weights: Float[Tensor, "batch heads blocks"],
    prunable: Bool[Tensor, "batch blocks"],
    visual: Int[Tensor, "batch"],
    budget: Budget,
    size: int,
) -> Bool[Tensor, "batch blocks"]:
    """The prunable blocks that are read, given each head's `weights` and the number of visual entries."""
    share = budget.share(_mass(weights, prunable))
    counts = (share * visual.float() / size).ceil().long().clamp(min=1)
    return _best(weights.mean(1), prunable, counts)


def _mass(weights: Float[Tensor, "batch heads keys"], visual: Bool[Tensor, "batch keys"]) -> Float[Tensor, "batch"]:
    """The most that any head gives to visual entries."""
    return (weights * visual[:, None]).sum(2).amax(1)


def _best(
    scores: Float[Tensor, "batch keys"], visual: Bool[Tensor, "batch keys"], counts: Int[Tensor, "batch"]
) -> Bool[Tensor, "batch keys"]:
    """The `counts` visual entries of each sample that score best, ties to the first; all if there are fewer.

    Those that the layer's mask hides are visual, too: they come last, before what is not visual.
    """
    hidden = torch.finfo(scores.dtype).min
    order = torch.where(visual, scores.clamp(min=hidden), -torch.inf).sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(order.shape[1], device=order.device) < counts[:, None]
    return torch.zeros_like(visual).scatter(1, order, first) & visual
