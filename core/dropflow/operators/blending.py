"""New rows of a video that are weighted sums of rows of all its frames, as a decision about images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dropflow.lifecycle.payloads import Encode

if TYPE_CHECKING:
    from dropflow.lifecycle.payloads import EncodeCall


@dataclass(frozen=True, eq=False)
class Blend:
    """The rows that a video is left with, as weighted sums of its rows before.

    Rows are numbered frame after frame: row i of frame t, of n rows each, is t * n + i. One term per old row that has a
    share in a new one.
    """

    old: Int[Tensor, "terms"]
    """Number of the old row."""
    new: Int[Tensor, "terms"]
    """Number of the row whose place the new row takes."""
    weight: Float[Tensor, "terms"]
    """Weight of the old row in the sum."""

    @classmethod
    def joined(cls, parts: Sequence[Blend]) -> Blend:
        """The terms of several parts of a video, whose new rows take different places."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("old", "new", "weight")))

    def sums(self, rows: Float[Tensor, "frames rows dim"]) -> Float[Tensor, "frames rows dim"]:
        """The new rows at their places, in float32, and zeros elsewhere."""
        flat = rows.float().flatten(0, 1)
        found = torch.zeros_like(flat).index_add(0, self.new, flat[self.old] * self.weight[:, None])
        return found.view(rows.shape)

    def counts(self, frames: int, rows: int) -> Float[Tensor, "frames rows"]:
        """How many old rows have a share in the new row at each place; 0 where there is none."""
        found = torch.zeros(frames * rows, device=self.new.device)
        return found.index_add(0, self.new, torch.ones_like(self.weight)).view(frames, rows)

    def shares(self, frames: int, rows: int) -> Float[Tensor, "frames rows old"]:
        """Weight of every old row of the video in the new row at each place."""
        found = torch.zeros(frames * rows, frames * rows, device=self.new.device)
        return found.index_put((self.new, self.old), self.weight, accumulate=True).view(frames, rows, -1)


def blended(call: EncodeCall, blends: Sequence[Blend]) -> Encode | None:
    """The decision that replaces the rows of every video (one blend for each) and leaves pictures as they are.

    Each video's frames must be whole (see `whole_frames`); `None` where there is no video. New rows have the dtype of
    the old ones, and the number of old rows as their size.
    """
    if not blends:
        return None
    rows, places, sizes = list(call.features), list(call.places), list(call.sizes)
    for frames, blend in zip(call.videos or (), blends, strict=True):
        before = torch.stack([call.features[frame] for frame in frames])
        sums, counts = blend.sums(before).to(before.dtype), blend.counts(*before.shape[:2])
        for frame, own, count in zip(frames, sums, counts, strict=True):
            kept = count.nonzero()[:, 0]
            rows[frame], places[frame], sizes[frame] = own[kept], kept, count[kept]
    after = tuple(places)

    def shares() -> tuple[Tensor, ...]:
        found = [torch.eye(len(own), device=own.device) for own in call.places]
        for frames, blend in zip(call.videos or (), blends, strict=True):
            for frame, own in zip(frames, blend.shares(len(frames), len(call.places[frames[0]])), strict=True):
                found[frame] = own[after[frame]]
        return tuple(found)

    return Encode(rows=tuple(rows), places=after, sizes=tuple(sizes), shares=shares, across_frames=True)
