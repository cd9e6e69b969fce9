"""The maths of token merging: bipartite soft matching and weighted means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Matching:
    """Which tokens of set A (positions 0, 2, 4, ...) are merged into which of set B (positions 1, 3, 5, ...)."""

    sources: Int[Tensor, "merged"]
    """Positions in A, most similar first."""
    destinations: Int[Tensor, "merged"]
    """For each source, a position in B; several sources may have one destination."""
    unmerged: Int[Tensor, "unmerged"]
    """Positions in A of the tokens that stay, in the order in which they go on."""


def match(metric: Float[Tensor, "tokens dim"], count: int, *, has_cls: bool) -> Matching:
    """Merge the `count` tokens of A that are most similar to any token of B (ToMe, section 3, bipartite soft matching).

    Similar means a large cosine of `metric`; ties go to the lowest position. The first token is never merged if it is
    CLS. At most half of the other tokens go. With CLS, unmerged tokens keep their order; without it, the most similar
    come first, as published.
    """
    count = max(min(count, (len(metric) - has_cls) // 2), 0)
    unit = torch.nn.functional.normalize(metric.float(), dim=1)
    similar = unit[::2] @ unit[1::2].T
    if has_cls:
        similar[0] = -torch.inf
    best, nearest = similar.max(1)
    order = torch.sort(best, descending=True, stable=True).indices
    sources, unmerged = order[:count], order[count:]
    return Matching(sources, nearest[sources], unmerged.sort().values if has_cls else unmerged)


def merge(
    matching: Matching, tokens: Float[Tensor, "tokens dim"], sizes: Float[Tensor, "tokens"]
) -> tuple[Float[Tensor, "left dim"], Float[Tensor, "left"]]:
    """Means of the merged tokens, each weighing what `sizes` says, and their new sizes.

    The unmerged tokens of A come first, then all of B. The mean is taken in float32.
    """
    weighted = tokens.float() * sizes[:, None]

    def joined(values: Tensor) -> Tensor:
        own, others = values[::2], values[1::2]
        return torch.cat((own[matching.unmerged], others.index_add(0, matching.destinations, own[matching.sources])))

    total = joined(sizes)
    return (joined(weighted) / total[:, None]).to(tokens.dtype), total


def shares(matching: Matching, sizes: Float[Tensor, "tokens"], prefix: int) -> Float[Tensor, "new rows"]:
    """Which rows each new one is the mean of: unit vectors are merged instead of tokens; the prefix is left out."""
    return merge(matching, torch.eye(len(sizes), device=sizes.device), sizes)[0][prefix:, prefix:]
