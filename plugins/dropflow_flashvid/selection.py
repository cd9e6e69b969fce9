"""The maths of FlashVID's selection: attended tokens of a frame that are unlike each other."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def event_weight(frames: Float[Tensor, "frames rows dim"]) -> Float[Tensor, "frames rows"]:
    """Mean, over the frames of a segment, of the product of each row with the mean row of that frame, in float32."""
    wide = frames.float()
    return wide @ wide.mean(1).mean(0)


def unlike(
    rows: Float[Tensor, "frames rows dim"], weight: Float[Tensor, "frames rows"], count: int
) -> Int[Tensor, "frames count"]:
    """`count` rows of each frame, ascending: greedily the one whose nearest chosen one is farthest.

    The distance of row i to a candidate j is 1 less their cosine, times the weight of j. The first choice is the
    candidate whose nearest other row is farthest. No row is chosen twice; ties go to the lowest index. Norms are at
    least 1e-12.
    """
    unit = torch.nn.functional.normalize(rows.float(), dim=-1, eps=1e-12)
    distance = (1 - unit @ unit.transpose(1, 2)) * weight.float()[:, None, :]
    frame = torch.arange(len(rows), device=rows.device)
    second = distance.sort(1).values[:, min(1, rows.shape[1] - 1)]
    chosen = [second.argmax(1)]
    free = torch.zeros_like(second)
    least = torch.full_like(second, torch.inf)
    for _ in range(count - 1):
        free[frame, chosen[-1]] = -torch.inf
        least = torch.minimum(least, distance[frame, chosen[-1]])
        chosen.append((least + free).argmax(1))
    return torch.stack(chosen, 1).sort(1).values
