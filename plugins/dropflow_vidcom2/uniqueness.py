"""The maths of VidCom2: how usual a token is in its video and its frame, what each frame may keep, and which tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TEMPERATURE = 0.01
"""Of the softmax over frames; nearly all goes to one frame where frames differ."""
WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
"""Variances of the Gaussian kernels that are summed up."""


@dataclass(frozen=True)
class Usual:
    """How near the tokens of a video are to means: 0 for far, 5 for the same."""

    video: Float[Tensor, "frames rows"]
    """To the mean of the whole video."""
    frame: Float[Tensor, "frames rows"]
    """To the mean of the token's own frame."""

    @classmethod
    def of(cls, frames: Float[Tensor, "frames rows dim"]) -> Usual:
        """Compare normalised tokens in the half of the channels that vary least over the video, at least one."""
        wide = frames.float()
        spread = wide.flatten(0, 1).var(0, correction=0)
        calm = torch.sort(spread, stable=True).indices[: max(1, len(spread) // 2)]
        tokens = torch.nn.functional.normalize(wide[..., calm], dim=-1)
        return cls(_kernels(tokens, tokens.mean((0, 1))), _kernels(tokens, tokens.mean(1, keepdim=True)))

    @property
    def both(self) -> Float[Tensor, "frames rows"]:
        """The sum of the two: tokens with the least of it stay."""
        return self.video + self.frame

    def shares(self, retention: float) -> Float[Tensor, "frames"]:
        """The share of each frame's tokens that stays; on average `retention`, more for unusual frames, at most 1."""
        unusual = -self.video.mean(1)
        weight = torch.softmax((unusual - unusual.max()) / TEMPERATURE, 0)
        return (retention * (1 + weight - weight.mean())).clamp(max=1)


def _kernels(tokens: Tensor, mean: Tensor) -> Tensor:
    distance = (tokens - mean).square().sum(-1)
    return torch.stack([torch.exp(-distance / (2 * width)) for width in WIDTHS]).sum(0)


def counts(shares: Float[Tensor, "frames"], rows: int) -> Int[Tensor, "frames"]:
    """Tokens that each frame keeps of its `rows`: rounded half to even, at least one."""
    return (shares * rows).round().long().clamp(min=1)


def least(scores: Float[Tensor, "frames rows"], count: Int[Tensor, "frames"]) -> Bool[Tensor, "frames rows"]:
    """The `count` lowest-scored tokens of each frame, ties to the lowest index."""
    rank = torch.argsort(torch.argsort(scores, dim=1, stable=True), dim=1)
    return rank < count[:, None]


def exactly(
    keep: Bool[Tensor, "frames rows"], scores: Float[Tensor, "frames rows"], count: int
) -> Bool[Tensor, "frames rows"]:
    """`keep` with `count` tokens in all: without its highest-scored ones over the whole video, or with others' lowest.

    Ties go to the earlier frame, then to the lowest index. A frame may lose its last token.
    """
    order = torch.sort(scores.flatten(), stable=True).indices
    order = order[torch.sort((~keep.flatten()[order]).to(torch.uint8), stable=True).indices]
    found = torch.zeros(keep.numel(), dtype=torch.bool, device=keep.device)
    return found.index_fill(0, order[:count], True).view(keep.shape)
