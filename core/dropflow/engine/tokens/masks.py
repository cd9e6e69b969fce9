"""The mask of a decoder layer, gathered from the model's own: rows of live queries, columns of held keys."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.host import read
from dropflow.engine.tokens.live_set import LiveSet


def gather_mask(mask: Tensor | None, queries: LiveSet, keys: KeyIndex, *, flash: bool) -> Tensor | None:
    """The mask of a layer that runs `queries` against the entries `keys`, from the model's full-length mask.

    `keys` covers past and present entries. transformers builds these kinds of masks: `None` (causal, no padding), which
    is kept where no padding slot must be hidden and queries and keys are the same tokens; (batch, keys) for
    FlashAttention; (batch, heads, queries, keys), boolean for SDPA or additive for eager. `flash` decides which kind
    replaces a `None` that cannot be kept. A mask may have columns for further tokens, as that of a static cache has.
    """
    if mask is None:
        if keys.valid is None and (flash or queries.slots in (1, len(keys))):
            return None
        return keys.valid if flash else causal_mask(queries, keys)
    logical = keys.logical.to(mask.device)
    if mask.dim() == 2:
        columns = mask.expand(logical.shape[0], -1).gather(1, logical)
        return columns if keys.valid is None else columns * keys.valid.to(columns)
    batch = torch.arange(logical.shape[0], device=mask.device)[:, None, None]
    mask = mask.expand(logical.shape[0], *mask.shape[1:])
    picked = mask[batch, :, queries.index.to(mask.device)[:, :, None], logical[:, None, :]].movedim(-1, 1)
    if keys.valid is not None:
        picked = without(picked, keys.valid.to(picked.device)[:, None, None])
        if picked.dtype == torch.bool:
            picked = picked | _own_slot(queries, keys).to(picked.device)
    return picked


def continued_mask(mask: Tensor | None, index: KeyIndex, length: int, tokens: int, *, flash: bool) -> Tensor | None:
    """The mask of a layer that runs all `tokens` of a text-only call after `length` logical tokens were seen.

    `index` describes the explicit entries of its cache; every later token has an entry in order. The kinds of masks are
    those of `gather_mask`.
    """
    if mask is None:
        if index.valid is None:
            return None
        if flash or tokens == 1:
            more = length - index.length + tokens
            seen = torch.nn.functional.pad(index.valid, (0, more), value=True)
            return seen if flash else seen[:, None, None, :]
        whole = LiveSet.whole(len(index.logical), tokens, index.logical.device)
        return causal_mask(whole, index.upto(length + tokens))
    columns, valid = index.columns(mask.shape[-1])
    columns = columns.to(mask.device)
    valid = None if valid is None else valid.to(mask.device)
    if len(mask) != len(columns):
        mask = mask.expand(len(columns), *mask.shape[1:])
    if mask.dim() == 2:
        held = mask.gather(1, columns[:, 0, 0])
        return held if valid is None else held * valid[:, 0, 0].to(held.dtype)
    if mask.shape[1] * mask.shape[2] > 1:
        columns = columns.expand(-1, mask.shape[1], mask.shape[2], -1)
    held = mask.gather(3, columns)
    return held if valid is None else without(held, valid)


def trimmed(mask: Tensor | None, length: int) -> Tensor | None:
    """A mask without the columns of tokens after the first `length`, which that of a static cache has."""
    return mask if mask is None else mask[..., :length]


def taken_mask(mask: Tensor | None, kept: LiveSet, *, flash: bool) -> Tensor | None:
    """The mask of a single query per sample, reduced to the entries in the slots of `kept`, a live set over entries.

    `None` means that every entry is seen; otherwise the kinds of masks are those of `gather_mask`.
    """
    valid = kept.valid
    if mask is None:
        return valid if valid is None or flash else valid[:, None, None]
    columns = kept.index.to(mask.device)
    valid = None if valid is None else valid.to(mask.device)
    mask = mask.expand(len(columns), *mask.shape[1:])
    if mask.dim() == 2:
        taken = mask.gather(1, columns)
        return taken if valid is None else taken * valid.to(taken.dtype)
    taken = mask.gather(3, columns[:, None, None].expand(-1, *mask.shape[1:3], -1))
    return taken if valid is None else without(taken, valid[:, None, None])


def parked_mask(mask: Tensor | None, active: Bool[Tensor, "batch keys"], *, flash: bool) -> Tensor:
    """The mask of a single query per sample in which entries that are not `active` are hidden."""
    if mask is None:
        return active if flash else active[:, None, None]
    active = active.to(mask.device)
    return mask * active.to(mask.dtype) if mask.dim() == 2 else without(mask, active[:, None, None])


def causal_mask(queries: LiveSet, keys: KeyIndex) -> Bool[Tensor, "batch 1 queries keys"]:
    """A causal mask: each query sees the valid keys at or before its own position."""
    start = keys.length - queries.total
    seen = (start + queries.index)[:, :, None] >= keys.logical[:, None, :]
    if keys.valid is None:
        return seen[:, None]
    return (seen & keys.valid[:, None, :])[:, None] | _own_slot(queries, keys)


def last_seen(mask: Tensor | None, batch: int, tokens: int, device: torch.device) -> Int[Tensor, "batch tokens"]:
    """The last token that each one of a new prompt sees, by a mask (batch or 1, heads, tokens, tokens or more).

    A later one where, for instance, all tokens of an image see each other. Other kinds of masks are causal.
    """
    place = torch.arange(tokens, device=device)
    if mask is None or mask.dim() != 4:
        return place.expand(batch, -1)
    last = (_seen(mask)[..., :tokens].any(1) * place.to(mask.device)).amax(2)
    return last.to(device).expand(batch, -1)


def lets_see_later(mask: Tensor | None) -> bool:
    """Whether a mask (batch, heads, tokens, tokens) of a new prompt lets a token see a later one.

    As where all tokens of an image see each other. One host synchronisation.
    """
    if mask is None or mask.dim() != 4:
        return False
    ((later,),) = read(_seen(mask).triu(1 + mask.shape[3] - mask.shape[2]).any())
    return bool(later)


def _seen(mask: Tensor) -> Bool[Tensor, "batch heads queries keys"]:
    """A boolean or additive mask as a boolean one."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def without(mask: Tensor, valid: Tensor) -> Tensor:
    """The mask, boolean or additive, with keys hidden that are not `valid`."""
    return mask & valid if mask.dtype == torch.bool else mask.masked_fill(~valid, _nothing(mask.dtype))


def _nothing(dtype: torch.dtype) -> float | bool:
    """The value that hides a key in a mask of this dtype."""
    return False if dtype == torch.bool else torch.finfo(dtype).min


def _own_slot(queries: LiveSet, keys: KeyIndex) -> Tensor:
    """Boolean (batch, 1, queries, keys) that lets padding queries see themselves, since an empty row yields NaN."""
    slots, entries = queries.slots, len(keys)
    own = torch.eye(slots, entries, dtype=torch.bool, device=keys.logical.device).roll(entries - slots, 1)
    if queries.valid is None:
        return torch.zeros_like(own)[None, None]
    return (own[None] & ~queries.valid[:, :, None])[:, None]
