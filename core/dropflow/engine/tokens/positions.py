"""Compact positions: after every drop the remaining tokens are renumbered without gaps, layer by layer.

The position of a token in a layer is its original position minus the number of its sample's tokens missing before it
in that layer. So a generated token's position is the length of that layer's cache, and cached keys are never rotated
again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dropflow.engine.tokens.live_set import LiveSet
from dropflow.engine.tokens.restricting import restrict

IDS, EMBEDDINGS = "position_ids", "position_embeddings"
"""The arguments of a decoder layer that hold its tokens' positions."""


def renumbered(
    arguments: Mapping[str, Any],
    live: LiveSet,
    valid: Bool[Tensor, "batch tokens"] | None,
    dropped: Int[Tensor, "batch"] | None,
    rotary: Callable[[Tensor], Any],
    *,
    before: int = 0,
) -> dict[str, Any]:
    """Position arguments of a layer for the live tokens, with dropped tokens not counted.

    Without `dropped` (tokens missing from the layer's cache), each token gets the model's own values at its rank among
    the live tokens, of which `before` stand before those of `live`; otherwise `rotary` computes embeddings for the new
    position ids (batch, slots).
    """
    own = {name: arguments[name] for name in (IDS, EMBEDDINGS) if name in arguments}
    if not live.everything:
        ranks = ranked(live, valid, before)
        own = {name: restrict(name, value, ranks, {}) for name, value in own.items()}
    if dropped is None:
        return own
    ids = own[IDS] - dropped.to(own[IDS].device)[:, None]
    return {IDS: ids, EMBEDDINGS: rotary(ids)}


def ranked(live: LiveSet, valid: Bool[Tensor, "batch tokens"] | None, before: int = 0) -> LiveSet:
    """The slots of `live`, each with the token that had its rank before any drop; padding slots name any token.

    Ranks begin at `before`.
    """
    batch, slots = live.index.shape
    place = torch.arange(slots, device=live.index.device).expand(batch, -1)
    if live.valid is not None:
        place = (place - (slots - live.valid.sum(1, keepdim=True))).clamp(min=0)
    place = place + before
    if valid is not None:
        # a stable sort of booleans puts the tokens that are not padding first, in order
        place = torch.argsort((~valid).to(torch.uint8), dim=1, stable=True).gather(1, place)
    return LiveSet(place, live.valid, live.total)
