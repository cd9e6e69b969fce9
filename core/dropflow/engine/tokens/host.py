"""What the host must know of tensors on a device, read in as few synchronisations as can be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor


def read(*values: Tensor) -> list[list[int]]:
    """Integers or booleans of any shapes, flattened; one host synchronisation for all of them."""
    flat = [value.flatten().long() for value in values]
    device = flat[0].device
    whole = torch.cat([value.to(device) for value in flat]).tolist()
    found, start = [], 0
    for value in flat:
        found.append(whole[start : start + len(value)])
        start += len(value)
    return found


class Extent(NamedTuple):
    """How many tokens of a mask (batch, tokens) are true."""

    low: int
    """In the sample with the fewest."""
    high: int
    """In the sample with the most."""
    total: int

    @classmethod
    def of(cls, counts: list[int]) -> Extent:
        """From the number of each sample."""
        return cls(min(counts), max(counts), sum(counts))

    @classmethod
    def read(cls, mask: Bool[Tensor, "batch tokens"]) -> Extent:
        """One host synchronisation."""
        return cls.of(read(mask.sum(1))[0])
