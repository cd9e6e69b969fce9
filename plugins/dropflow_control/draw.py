"""Random numbers for the tokens of one image that depend on the image itself and on nothing around it."""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor

from dropflow import EncodeBoundary

_DIRECTIONS = 3


def draw(seed: int, boundary: EncodeBoundary, features: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows"]:
    """Uniform random numbers in [0, 1), one per row, on the CPU.

    They follow from `seed`, the boundary (`None`: the output of the vision encoder) and the image's `fingerprint`, so
    that images draw apart from each other and an image draws the same whatever it is batched with.
    """
    key = repr((seed, boundary, len(features), fingerprint(features)))
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    dice = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    return torch.rand(len(features), generator=dice)


def fingerprint(features: Float[Tensor, "rows dim"]) -> tuple[int, ...]:
    """Which rows lie farthest along three fixed random directions, each row scaled to unit length.

    Features of one image differ in their last bits from batch to batch, so that a hash of their values would too; the
    winner of a comparison does not, unless two rows are as good as equal. No row is picked for what it holds: the
    winners only seed the draw.
    """
    if not len(features):
        return ()
    dice = torch.Generator().manual_seed(0)
    directions = torch.randn(features.shape[1], _DIRECTIONS, generator=dice).to(features.device)
    with torch.no_grad():
        along = torch.nn.functional.normalize(features.float(), dim=1) @ directions
        return tuple(along.argmax(0).tolist())
