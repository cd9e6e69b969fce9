"""How many tokens each layer's cache holds, by sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dropflow.engine.tokens.cache_index import KeyIndex


@dataclass(frozen=True, eq=False)
class Holdings:
    """Number of tokens that each layer's cache holds, excluding padding."""

    entries: Int[Tensor, "layers batch"]
    """All tokens held."""
    visual: Int[Tensor, "layers batch"]
    """Visual tokens held."""
    dense: Int[Tensor, "batch"]
    """Tokens a layer would hold if nothing had been dropped or evicted."""

    @classmethod
    def of(cls, indices: Sequence[KeyIndex], length: int) -> Holdings:
        """The holdings of caches with these indices after `length` logical tokens; no host synchronisation."""
        made: dict[KeyIndex, tuple[Tensor, Tensor]] = {}
        device = indices[0].logical.device
        for index in indices:
            if index not in made:
                tokens = index.tokens + (length - index.length)
                made[index] = tokens.to(device), index.visual.to(device)
        entries, visual = (torch.stack([made[index][part] for index in indices]) for part in (0, 1))
        first = indices[0]
        dense = entries[0] if first.dropped is None else entries[0] + first.dropped.to(device)
        return cls(entries, visual, dense)
