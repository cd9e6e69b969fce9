"""The maths of DyCoke's temporal part: which frame each one is thinned against, and which of its tokens stay."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def compared_with(frames: int, *, last_group: bool) -> dict[int, int]:
    """Frame that is thinned -> the earlier frame with which it is compared; all others stay whole.

    In groups of four frames, the second is compared with the first, the fourth with the third, and the third with the
    first. In the last group, the third stays whole unless `last_group` is true.
    """
    found = {frame: frame - 1 for frame in range(1, frames, 2)}
    end = frames if last_group else frames - 2
    return found | {frame: frame - 2 for frame in range(2, end, 4)}


def thinned(
    frames: Float[Tensor, "frames rows dim"], drop: float, *, last_group: bool = False
) -> Bool[Tensor, "frames rows"]:
    """Which tokens stay when thinned frames lose the share `drop`: those with the lowest cosine to the same place.

    int((1 - drop) * rows) of a thinned frame stay, ties going to the lowest index; comparison is in float32 with the
    original frames. Norms are at least 1e-8.
    """
    rows, wide = frames.shape[1], frames.float()
    unit = wide / wide.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    keep = torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device)
    against = compared_with(len(frames), last_group=last_group)
    if against:
        thin, other = list(against), list(against.values())
        cosine = (unit[thin] * unit[other]).sum(-1).clamp(max=1 - 1e-6)  # tokens of equal frames tie
        rank = torch.argsort(torch.argsort(cosine, dim=1, stable=True), dim=1)
        keep[thin] = rank < int((1 - drop) * rows)
    return keep
