"""The maths of VisionZip: dominant tokens by attention, contextual tokens by merging what is left (section 3)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow.operators import top


def split(scores: Float[Tensor, "patches"], dominant: int) -> tuple[Int[Tensor, "dominant"], Int[Tensor, "left"]]:
    """The `dominant` best-scored patches and all the others, both in raster order."""
    chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    chosen[top(scores, dominant)] = True
    order = _chosen_first(chosen)
    return order[:dominant], order[dominant:]


def _chosen_first(chosen: Bool[Tensor, "patches"]) -> Int[Tensor, "patches"]:
    """Places where it is true, then the others, both ascending; their number, which the host knows, is not read."""
    return torch.argsort((~chosen).to(torch.uint8), stable=True)


def targets(left: int, contextual: int, device: torch.device) -> Int[Tensor, "contextual"]:
    """Positions, among `left` left-over patches, that contextual tokens grow from: evenly spaced, from the first on.

    The step is left // contextual, so that the tail after the last target holds none.
    """
    count = min(contextual, left)
    return torch.arange(count, device=device) * (left // max(count, 1))


def contextual_tokens(
    features: Float[Tensor, "left dim"], metric: Float[Tensor, "left width"], contextual: int
) -> Float[Tensor, "contextual dim"]:
    """Each target plus the mean of the left-over patches that are most similar to it, by cosine of `metric`.

    The sum of the target and the mean of its members, as released, not their average; a target without members stays
    as it is.
    """
    aim = targets(len(features), contextual, features.device)
    if not len(aim):
        return features[:0]
    chosen = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    chosen[aim] = True
    others = _chosen_first(chosen)[len(aim) :]
    with torch.no_grad():
        unit = torch.nn.functional.normalize(metric.float(), dim=1)
        assigned = (unit[others] @ unit[aim].T).argmax(1)
        members = torch.zeros_like(aim).index_add_(0, assigned, torch.ones_like(assigned)).clamp(min=1)
    sums = torch.zeros_like(features[aim]).index_add(0, assigned, features[others])
    return features[aim] + sums / members[:, None].to(sums.dtype)


def reduced(
    features: Float[Tensor, "patches dim"],
    prefix: Float[Tensor, "prefix dim"],
    scores: Float[Tensor, "patches"],
    metric: Float[Tensor, "patches width"],
    counts: tuple[int, int],
) -> Float[Tensor, "tokens dim"]:
    """What is left of an image: the first of `prefix` and dominant patches, then contextual tokens.

    `counts` are the numbers of dominant tokens, of which a prefix row is one, and of contextual ones.
    """
    dominant, contextual = counts
    cls = prefix[: min(dominant, 1)]
    kept, left = split(scores, max(dominant - len(cls), 0))
    merged = contextual_tokens(features[left], metric[left], contextual)
    return torch.cat((cls, features[kept], merged))


def shares(
    features: Float[Tensor, "patches dim"],
    prefix: Float[Tensor, "prefix dim"],
    scores: Float[Tensor, "patches"],
    metric: Float[Tensor, "patches width"],
    counts: tuple[int, int],
) -> Float[Tensor, "tokens rows"]:
    """The same reduction of unit vectors, one for each patch and then one for each prefix row."""
    unit = torch.eye(len(features) + len(prefix)).to(features)
    return reduced(unit[: len(features)], unit[len(features) :], scores, metric, counts)
