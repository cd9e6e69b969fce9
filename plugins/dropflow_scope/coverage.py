"""The maths of SCOPE: a greedy choice by how much a token adds to what is covered, times its saliency."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor


def greedy(
    features: Float[Tensor, "tokens dim"],
    saliency: Float[Tensor, "tokens"],
    count: int,
    *,
    alpha: float = 1.0,
    combine: Literal["multi", "add"] = "multi",
    fill: Literal["index", "attention"] = "index",
) -> Int[Tensor, "count"]:
    """Choose `count` tokens, in the order of choice; a choice of k tokens starts with the choice of k - 1.

    With S the cosines of `features` in float32, and c_u the coverage of token u, 0 at first: the gain of a token v is
    the sum over all tokens u of max(S_uv - c_u, 0). The next choice has the largest gain_v * a_v^alpha (`multi`) or
    gain_v + a_v^alpha (`add`), a the saliency; then c_u becomes max(c_u, S_uv). Ties go to the lowest index, so that
    tokens fill up in their order once everything is covered; with `fill` `attention` the most salient do. A zero
    vector has cosine 0 with all others. Nothing is read back from the device.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=1, eps=1e-12)
    similar, weight = unit @ unit.T, saliency.float() ** alpha
    covered, free = similar.new_zeros(len(unit)), torch.zeros_like(weight)  # -inf for what is chosen
    chosen: list[Tensor] = []
    for _ in range(min(count, len(unit))):
        gain = _gains(similar, covered)
        score = gain * weight if combine == "multi" else gain + weight
        if fill == "attention":
            score = torch.where((gain + free > 0).any(), score, weight)
        pick = (score + free).argmax()
        chosen.append(pick)
        free = free.index_fill(0, pick, -torch.inf)
        covered = torch.maximum(covered, similar.index_select(0, pick[None])[0])
    return torch.stack(chosen) if chosen else torch.zeros(0, dtype=torch.long, device=features.device)


def _gains(similar: Float[Tensor, "tokens tokens"], covered: Float[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
    """What each token would add to the coverage; in slices, so that no second map of all tokens is held."""
    step = max(1, len(covered) // 8)
    parts = zip(torch.split(similar, step), torch.split(covered, step), strict=True)
    return torch.stack([(own - least[:, None]).clamp(min=0).sum(0) for own, least in parts]).sum(0)
