"""The maths of FlashVID's merging: trees of alike tokens over time, and clusters of what is left of every frame."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow.operators import Blend, density_peaks

NEIGHBOURS = 7
"""Nearest rows, itself included, by which the density of a row is measured."""


@dataclass(frozen=True, eq=False)
class Trees:
    """Of which row of a segment each unselected row is a part, frame after frame."""

    root: Int[Tensor, "frames rows"]
    """Number, in the segment, of the row it has become a part of; its own if it stays."""
    children: Float[Tensor, "frames rows"]
    """Rows of the next frame that are merged directly into each."""

    @classmethod
    def grown(
        cls, frames: Float[Tensor, "frames rows dim"], free: Bool[Tensor, "frames rows"], threshold: float, least: int
    ) -> Trees:
        """Merge rows that are free into the most alike free row of the frame before, if their cosine is high enough.

        It is if above `threshold`; where fewer than `least` rows of the segment would be left, the threshold rises
        so that one more than these stay, if it can.
        """
        length, rows = frames.shape[:2]
        unit = torch.nn.functional.normalize(frames.float(), dim=-1, eps=1e-12)
        cosine = (unit[1:] @ unit[:-1].transpose(1, 2)).clamp(max=1)  # rounding goes beyond
        cosine = torch.where(free[1:, :, None] & free[:-1, None, :], cosine, -torch.inf)
        alike, link = cosine.max(2)
        merges = alike > threshold
        allowed = length * rows - least
        merges &= (merges.sum() <= allowed) | (alike > _rank(alike.flatten(), allowed))
        own = torch.arange(length * rows, device=frames.device).view(length, rows)
        root, children = own.clone(), torch.zeros(length * rows, device=frames.device)
        for step in range(length - 1):
            root[step + 1] = torch.where(merges[step], root[step].gather(0, link[step]), own[step + 1])
            into = step * rows + link[step]
            children.index_add_(0, into, merges[step].float())
        return cls(root, children.view(length, rows))

    def blend(self, free: Bool[Tensor, "frames rows"], *, published: bool) -> Blend:
        """The rows that are free in sums over trees, at the places of their roots.

        Such a sum is the mean of the tree's rows or, as `published`, that of the rows over one more than the direct
        children of the root.
        """
        old = free.flatten().nonzero()[:, 0]
        root = self.root.flatten()[old]
        members = torch.bincount(root, minlength=free.numel())
        divisor = 1 + self.children.flatten() if published else members.float()
        return Blend(old, root, 1 / divisor[root])


def _rank(alike: Float[Tensor, "links"], allowed: int) -> Float[Tensor, ""] | float:
    """The `allowed`-th largest; infinite where none is allowed."""
    return alike.sort(descending=True).values[allowed - 1] if 0 < allowed <= len(alike) else torch.inf


def blend(
    frames: Float[Tensor, "frames rows dim"],
    free: Bool[Tensor, "frames rows"],
    rest: int,
    threshold: float,
    *,
    published: bool,
) -> Blend:
    """About `rest` rows per frame that sum up the rows of a segment that are free, `rest` being at least 1.

    Rows that trees leave are divided into as many clusters in each frame as is its part of them. A new row is the mean
    of all rows it stands for, and takes the place of its cluster's centre. As `published`, a tree is the sum of its
    rows over one more than the direct children of its root, and a cluster the plain mean of its trees.
    """
    length, rows = frames.shape[:2]
    least = length * (int((~free[0]).sum()) + rest)
    trees = Trees.grown(frames, free, threshold, least).blend(free, published=published)
    states = trees.sums(frames)
    left = trees.counts(length, rows) > 0
    counts = left.sum(1).tolist()
    ratio = rest * length / max(1, sum(counts))
    centre = torch.zeros_like(left.flatten(), dtype=torch.long)
    for frame, (own, here) in enumerate(zip(left, counts, strict=True)):
        if not here:
            continue
        clusters = here if ratio >= 1 else rest if length == 1 else math.ceil(here * ratio)
        place = own.nonzero()[:, 0]
        centres, cluster = density_peaks(states[frame][place], clusters, min(NEIGHBOURS, clusters))
        centre[frame * rows + place] = frame * rows + place[centres[cluster]]
    new = centre[trees.new]
    if published:
        in_cluster = torch.bincount(centre[left.flatten()], minlength=length * rows)
        return Blend(trees.old, new, trees.weight / in_cluster[new])
    return Blend(trees.old, new, 1 / torch.bincount(new, minlength=length * rows)[new].float())
