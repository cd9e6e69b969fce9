"""The maths of DART: pivots by the size of their keys, and the tokens that are least similar to them (section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dropflow import PruneCall
from dropflow.operators import top


def key_sizes(keys: Float[Tensor, "kv_heads tokens dim"]) -> Float[Tensor, "tokens"]:
    """L1 norm of each token's key over all heads, in float32. (Repeating grouped heads would scale all alike.)"""
    return keys.float().abs().sum((0, 2))


def turned_key_sizes(keys: Float[Tensor, "kv_heads tokens dim"]) -> Float[Tensor, "tokens"]:
    """Thousandths of the logarithm of each key's L2 norm over all heads.

    RoPE rotates a key: its L1 norm then depends on its position, padding included, while its L2 norm stays the same.
    Where k-norm gives all keys about the same length, steps of a thousandth make them equal, so that their order
    decides and not a rounding error.
    """
    return (keys.float().square().sum((0, 2)).log() * 500).round()


def least_alike(
    states: Float[Tensor, "tokens dim"],
    pool: Int[Tensor, "pool"],
    pivots: Sequence[int],
    quotas: Sequence[int],
) -> Int[Tensor, "taken"]:
    """From `pool`, for one pivot after the other, its quota of the tokens with the smallest cosine to it.

    What one pivot has taken is gone for the next; an empty pool gives no more. Ties go to the first in the pool.
    """
    unit = torch.nn.functional.normalize(states.float(), dim=1)
    taken = []
    for pivot, quota in zip(pivots, quotas, strict=True):
        chosen = top(-(unit[pool] @ unit[pivot]), quota)
        taken.append(pool[chosen])
        left = torch.ones(len(pool), dtype=torch.bool, device=pool.device)
        left[chosen] = False
        pool = pool[left]
    return torch.cat(taken) if taken else pool[:0]


def even_quotas(total: int, pivots: int) -> list[int]:
    """`total` divided evenly among the pivots, one more for the first ones where it does not go into it."""
    return [(total + pivots - 1 - place) // pivots for place in range(pivots)]


def published_order(pivots: Sequence[int]) -> list[int]:
    """The order in which the released code goes through its pivots: that of a set of their sequence indices."""
    return list(set(pivots))


def text_after(call: PruneCall, row: int, last_patch: int) -> Int[Tensor, "text"]:
    """Slots of the text after an image, up to the sample's last instruction token."""
    slots = torch.arange(call.index.shape[1], device=call.index.device)
    last = torch.where(call.instruction_valid[row], call.instruction_slots[row], -1).amax()
    return slots[call.text[row] & (slots > last_patch) & (slots <= last)]
