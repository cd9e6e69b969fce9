"""Gathers what crosses into a layer, the model's own mask above all: rows of live queries, columns of held keys."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.live_set import LiveSet

OWN_WAY = ("attention_mask", "past_key_values", "hidden_states")
"""Arguments of a decoder layer that are not restricted by their token dimension."""


def restrict_argument(value: Any, live: LiveSet) -> Any:
    """Restrict one argument of a decoder layer to the live tokens; what has no token dimension passes unchanged.

    Floats carry tokens on dimension -2 ((batch, tokens, dim), cos and sin, per-layer inputs), integers and booleans on
    -1 ((batch, tokens), (3, batch, tokens)); tuples and lists are taken apart. A batch dimension of 1 is broadcast.
    """
    if isinstance(value, tuple | list):
        return type(value)(restrict_argument(item, live) for item in value)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    wide = (value.is_floating_point() or value.is_complex()) and value.dim() >= 2 and value.shape[-2] == live.total
    if not wide and value.shape[-1] != live.total:
        return value
    return _take(value, live.index) if wide else _take(value[..., None], live.index)[..., 0]


def _take(value: Tensor, index: Int[Tensor, "batch slots"]) -> Tensor:
    """Rows of dimension -2 of a (..., batch or 1, tokens, dim) tensor, by sample."""
    batch, slots = index.shape
    index = index.to(value.device)
    if value.dim() == 2:
        value = value[None]
    if batch == 1:
        return value.index_select(-2, index[0])
    lead, dim = value.shape[:-3], value.shape[-1]
    value = value.expand(*lead, batch, *value.shape[-2:])
    return value.gather(-2, index.view(*[1] * len(lead), batch, slots, 1).expand(*lead, batch, slots, dim))


def gather_mask(mask: Tensor | None, queries: LiveSet, keys: KeyIndex, *, flash: bool) -> Tensor | None:
    """The mask of a layer that runs `queries` against the entries `keys`, from the model's full-length mask.

    `keys` covers past and present entries. Kinds of masks, as transformers builds them: `None` (causal, nothing
    padded) stays so where no padding slot needs hiding; (batch, keys) for FlashAttention; (batch, heads, queries,
    keys) boolean for SDPA or additive for eager. `flash` says which kind replaces a `None` that cannot stay.
    """
    if mask is None:
        return None if keys.valid is None else (keys.valid if flash else causal_mask(queries, keys))
    logical = keys.logical.to(mask.device)
    if mask.dim() == 2:
        columns = mask.expand(logical.shape[0], -1).gather(1, logical)
        return columns if keys.valid is None else columns * keys.valid.to(columns.dtype)
    batch = torch.arange(logical.shape[0], device=mask.device)[:, None, None]
    mask = mask.expand(logical.shape[0], *mask.shape[1:])
    picked = mask[batch, :, queries.index.to(mask.device)[:, :, None], logical[:, None, :]].movedim(-1, 1)
    if keys.valid is None:
        return picked
    hidden = ~keys.valid[:, None, None, :]
    if picked.dtype != torch.bool:
        return picked.masked_fill(hidden, torch.finfo(picked.dtype).min)
    return (picked & ~hidden) | _own_slot(queries, keys)


def causal_mask(queries: LiveSet, keys: KeyIndex) -> Bool[Tensor, "batch 1 queries keys"]:
    """Each query sees valid keys that are not later than itself."""
    start = keys.length - queries.total
    seen = (start + queries.index)[:, :, None] >= keys.logical[:, None, :]
    if keys.valid is None:
        return seen[:, None]
    return (seen & keys.valid[:, None, :])[:, None] | _own_slot(queries, keys)


def _own_slot(queries: LiveSet, keys: KeyIndex) -> Tensor:
    """Boolean (batch, 1, queries, keys): lets padding queries see themselves, for a row that sees nothing gives NaN."""
    slots, entries = queries.slots, len(keys)
    own = torch.eye(slots, entries, dtype=torch.bool, device=keys.logical.device).roll(entries - slots, 1)
    if queries.valid is None:
        return torch.zeros_like(own)[None, None]
    return (own[None] & ~queries.valid[:, :, None])[:, None]
