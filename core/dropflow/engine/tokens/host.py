"""Reads what the host must know of device tensors, in as few synchronisations as possible."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor


def read(*values: Tensor) -> list[list[int]]:
    """The values of integer or boolean tensors of any shape, flattened; one host synchronisation for all of them."""
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
    """Count in the sample with the fewest."""
    high: int
    """Count in the sample with the most."""
    total: int

    @classmethod
    def of(cls, counts: list[int]) -> Extent:
        """From the count of each sample."""
        return cls(min(counts), max(counts), sum(counts))

    @classmethod
    def read(cls, mask: Bool[Tensor, "batch tokens"]) -> Extent:
        """From a mask on the device; one host synchronisation."""
        return cls.of(read(mask.sum(1))[0])
