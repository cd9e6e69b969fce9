"""The maths of the output-aware cache: entries of surviving tokens, and the attention entries received."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dropflow import CacheCall, CacheView


def survivors(call: CacheCall, first: int, last: int) -> dict[int, Bool[Tensor, "batch keys"]]:
    """For each layer from `first` on that holds others than the last one up to `last`: entries of tokens both hold."""
    *earlier, final = [view for view in call.layers if first <= view.layer <= last]
    held = torch.zeros(len(final.index), call.length + 1, dtype=torch.bool, device=final.index.device)
    held.scatter_(1, final.index.masked_fill(~final.valid, call.length), True)  # padding: a column nobody reads
    reduced = [view for view in earlier if view.same_as != final.same_as]
    return {view.layer: held.gather(1, view.index) for view in reduced}


def attended(call: CacheCall, view: CacheView) -> Float[Tensor, "batch keys"]:
    """The most attention, mean over heads, that any token generated so far has given to each entry of a layer."""
    rows = torch.arange(call.tokens, device=view.index.device).expand(len(view.index), -1)
    with torch.no_grad():
        now = call.attention_rows(view.layer, rows).mean(1).amax(1).to(view.index.device)
    return now if view.memory is None else torch.maximum(view.memory, now)
