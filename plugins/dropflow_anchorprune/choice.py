"""The maths of AnchorPrune: an anchor of relevant tokens that ends where they bring news, and its expansion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Anchoring:
    """When the anchor ends."""

    threshold: float = 0.2
    """Distance (1 less the cosine) from the anchor's core above which a token is news."""
    patience: int = 3
    """Tokens with news at which the anchor ends, the last of them included."""
    ratio: float = 0.5
    """Share of all tokens that stay that the anchor takes at most, rounded down."""


def anchor(
    relevance: Float[Tensor, "tokens"],
    features: Float[Tensor, "tokens dim"],
    count: int,
    least: int,
    how: Anchoring,
) -> Int[Tensor, "anchors"]:
    """The most relevant tokens, best first, ties to the lowest index: at least `least` of the `count` that stay.

    The first `least` are the core. More follow by rank until `patience` of them lie farther than the threshold from
    the whole core, or the share `ratio` of `count` is reached.
    """
    count = min(count, len(relevance))
    least = min(max(1, least), count)
    most = min(max(least, int(how.ratio * count)), count)
    ranked = torch.sort(relevance, descending=True, stable=True).indices[:most]
    unit = normalize(features.float(), dim=1, eps=1e-12)[ranked]
    nearest = (unit[least:] @ unit[:least].T).amax(1) if least else unit.new_zeros(0)
    news = ((1 - nearest) > how.threshold).long()
    before = news.cumsum(0) - news
    return ranked[: least + int((before < how.patience).sum())]


def expanded(
    anchors: Int[Tensor, "anchors"],
    importance: Float[Tensor, "tokens"],
    features: Float[Tensor, "tokens dim"],
    count: int,
) -> Int[Tensor, "chosen"]:
    """The anchors and further tokens up to `count`, in the order of choice.

    Each next one has the largest importance times distance (1 less the cosine, at most 1) to the nearest token that is
    chosen already; ties go to the lowest index, and negative importance counts as 0.
    """
    unit = normalize(features.float(), dim=1, eps=1e-12)
    weight = importance.float().clamp(min=0)
    least = (1 - unit @ unit[anchors].T).amin(1).clamp(max=1) if len(anchors) else torch.ones_like(weight)
    chosen, taken = list(anchors), torch.zeros_like(weight).index_fill(0, anchors, -torch.inf)
    while len(chosen) < min(count, len(unit)):
        pick = (least * weight + taken).argmax()
        chosen.append(pick)
        taken = taken.index_fill(0, pick, -torch.inf)
        least = torch.minimum(least, 1 - unit @ unit.index_select(0, pick[None])[0])
    return torch.stack(chosen) if chosen else anchors
