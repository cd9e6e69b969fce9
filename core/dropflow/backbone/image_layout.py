"""The images of a prompt: their rows of features, their patch grids, and their rows that are not patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class ImageLayout:
    """What counts as one image: a picture, a tile of a large picture, or a frame of a video.

    Its rows are contiguous. Extra rows, such as newline tokens, are not patches: no stage sees them, and they are kept
    exactly as long as any patch of their line is. A line is the grid row that an extra row ends, or else the whole
    image. (With `line_ends`, the rows of `head` belong to the first line and those of `tail` to the last.)
    """

    tokens: int
    """Rows of the features, extra ones included."""
    grid: tuple[int, int] | None = None
    """Patch grid (rows, columns); `None` where there is none."""
    head: int = 0
    """Extra rows before the patches, such as a CLS row."""
    line_ends: bool = False
    """Whether every grid row is followed by an extra row; needs `grid`."""
    tail: int = 0
    """Extra rows after the patches."""
    closes: bool = False
    """Whether the rows of `tail` end the whole entry of the features whose last image this is, such as a video: they
    then stay as long as any patch of the entry. No other image of the entry may have extra rows."""

    @property
    def has_extra(self) -> bool:
        """Whether some rows are not patches."""
        return self.tokens > 0 and bool(self.head or self.line_ends or self.tail)

    @property
    def patches(self) -> int:
        """Number of rows that are patches."""
        ends = self.grid[0] if self.line_ends and self.grid else 0
        return self.tokens - self.head - self.tail - ends

    def extra(self, device: torch.device) -> Bool[Tensor, "tokens"]:
        """Which rows are not patches."""
        extra = torch.zeros(self.tokens, dtype=torch.bool, device=device)
        extra[: self.head] = True
        extra[self.tokens - self.tail :] = True
        if self.line_ends and self.grid:
            columns = self.grid[1]
            extra[self.head + columns : self.tokens - self.tail : columns + 1] = True
        return extra

    @property
    def lines(self) -> int:
        """Number of lines that its rows belong to."""
        return max(1, self.grid[0]) if self.line_ends and self.grid else 1

    def patch_rows(self, device: torch.device) -> Int[Tensor, "patches"]:
        """The row of each patch."""
        patch = torch.arange(self.patches, device=device)
        ends = patch // self.grid[1] if self.line_ends and self.grid and self.grid[1] else 0
        return patch + self.head + ends

    def line(self, device: torch.device) -> Int[Tensor, "tokens"]:
        """The line that each row belongs to."""
        row = torch.arange(self.tokens, device=device) - self.head
        if not self.line_ends or not self.grid:
            return torch.zeros_like(row)
        return row.clamp(min=0, max=self.tokens - self.head - self.tail - 1) // (self.grid[1] + 1)

    def keep_of(self, patches: Bool[Tensor, "patches"]) -> Bool[Tensor, "tokens"]:
        """Which rows stay when these patches do."""
        if not self.has_extra:
            return patches
        extra, line, rows = self.extra(patches.device), self.line(patches.device), self.patch_rows(patches.device)
        keep = torch.zeros_like(extra).index_copy(0, rows, patches)
        alive = torch.zeros(self.lines, dtype=torch.long, device=patches.device).index_add(
            0, line[rows], patches.long()
        )
        return torch.where(extra, alive[line] > 0, keep)


def split(entries: Sequence[Tensor], layouts: Sequence[Sequence[ImageLayout]]) -> Iterator[tuple[ImageLayout, Tensor]]:
    """Each layout with its rows (tokens, dim), from the entries of a model's image features."""
    for entry, own in zip(entries, layouts, strict=True):
        start = 0
        for layout in own:
            yield layout, entry[start : start + layout.tokens]
            start += layout.tokens
