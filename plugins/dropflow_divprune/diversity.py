"""The maths of max-min diversity: a greedy solution of the max-min diversity problem (DivPrune, section 3.2)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def max_min(features: Float[Tensor, "tokens dim"], count: int) -> Int[Tensor, "count"]:
    """Choose `count` tokens that lie far apart, in the order of choice.

    The distance of two tokens is 1 less their cosine, in float32. The first choice is the token whose nearest other
    token is farthest; each next one is the token, not yet chosen, whose nearest chosen one is farthest. So a choice
    of k tokens starts with the choice of k - 1. Ties go to the lowest index. A zero vector has cosine 0 with all
    others. No map of all tokens is held: the first choice reads cosines in slices, every further one a single row.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    chosen: list[Tensor] = []
    least = unit.new_full((len(unit),), torch.inf)
    for _ in range(min(count, len(unit))):
        scores = _nearest_other(unit) if not chosen else least
        chosen.append(scores.argmax())
        least = torch.minimum(least, 1 - unit @ unit[chosen[-1]])
        least[chosen[-1]] = -torch.inf  # rounding may leave a chosen token, or its copy, above another's 0
    return torch.stack(chosen) if chosen else torch.zeros(0, dtype=torch.long, device=features.device)


def _nearest_other(unit: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens"]:
    """Distance of each token to the nearest other one; infinite for a single token."""
    step = max(1, len(unit) // 8)
    found = []
    for start in range(0, len(unit), step):
        cosines = unit[start : start + step] @ unit.T
        own = torch.arange(len(cosines), device=unit.device)
        cosines[own, own + start] = -torch.inf
        found.append(1 - cosines.amax(1))
    return torch.cat(found)
