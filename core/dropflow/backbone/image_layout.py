"""The images of a prompt: whose placeholders are whose, their patch grids, and the rows that belong to no patch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

KEPT, PROTECTED, IMAGE, LINE, EXTRA, CARRIED = range(6)
"""Columns of the flags of every row of image features; from `CARRIED` on, what stages gave the row to carry."""


@dataclass(frozen=True)
class ImageLayout:
    """What counts as one image: a picture, a tile of a large picture, or a frame of a video.

    Its rows lie one after the other. Extra rows, such as newline tokens, are no patches: no stage sees them, and they
    are kept exactly as long as a patch of their line is: the grid row they end, or else the whole image. (Where rows
    are ended, those of `head` go with the first row and those of `tail` with the last.)
    """

    tokens: int
    """Rows of the features, extra ones included."""
    grid: tuple[int, int] | None = None
    """Patch grid (rows, columns); `None` where there is none."""
    head: int = 0
    """Extra rows in front of the patches, such as a CLS row."""
    line_ends: bool = False
    """Whether every grid row is followed by an extra row; needs `grid`."""
    tail: int = 0
    """Extra rows behind the patches."""

    @property
    def has_extra(self) -> bool:
        """Whether some rows are no patches."""
        return self.tokens > 0 and bool(self.head or self.line_ends or self.tail)

    @property
    def patches(self) -> int:
        """Rows that are patches."""
        ends = self.grid[0] if self.line_ends and self.grid else 0
        return self.tokens - self.head - self.tail - ends

    def extra(self, device: torch.device) -> Bool[Tensor, "tokens"]:
        """Which rows are no patches."""
        extra = torch.zeros(self.tokens, dtype=torch.bool, device=device)
        extra[: self.head] = True
        extra[self.tokens - self.tail :] = True
        if self.line_ends and self.grid:
            columns = self.grid[1]
            extra[self.head + columns : self.tokens - self.tail : columns + 1] = True
        return extra

    def line(self, device: torch.device) -> Int[Tensor, "tokens"]:
        """The line that each row belongs to."""
        row = torch.arange(self.tokens, device=device) - self.head
        if not self.line_ends or not self.grid:
            return torch.zeros_like(row)
        return row.clamp(min=0, max=self.tokens - self.head - self.tail - 1) // (self.grid[1] + 1)

    def keep_of(self, patches: Bool[Tensor, "patches"]) -> Bool[Tensor, "tokens"]:
        """Rows that stay when of the patches these do."""
        if not self.has_extra:
            return patches
        extra, line = self.extra(patches.device), self.line(patches.device)
        keep = torch.zeros_like(extra)
        keep[~extra] = patches
        alive = torch.zeros(int(line.max()) + 1, dtype=torch.bool, device=patches.device)
        alive[line[keep]] = True
        return torch.where(extra, alive[line], keep)


def flags(
    layouts: Sequence[ImageLayout],
    first: int,
    device: torch.device,
    kept: Sequence[Bool[Tensor, "patches"]] | None = None,
    protected: Sequence[Bool[Tensor, "patches"]] | None = None,
    carried: Sequence[Float[Tensor, "patches carries"]] = (),
) -> Float[Tensor, "rows flags"]:
    """Flags of the rows of `layouts`, numbered from `first`: kept, protected, image number, line, extra, carried."""
    tables = []
    columns = CARRIED + (carried[0].shape[1] if carried else 0)
    for number, layout in enumerate(layouts):
        table = torch.zeros(layout.tokens, columns, device=device)
        table[:, KEPT] = 1.0 if kept is None else layout.keep_of(kept[number]).float()
        table[:, IMAGE] = first + number
        if layout.has_extra:
            table[:, EXTRA] = layout.extra(device).float()
            table[:, LINE] = layout.line(device).float()
        if protected is not None:
            table[table[:, EXTRA] == 0, PROTECTED] = protected[number].float()
        if columns > CARRIED:
            table[table[:, EXTRA] == 0, CARRIED:] = carried[number].to(table)
        tables.append(table)
    return torch.cat(tables) if tables else torch.zeros(0, columns, device=device)


def split(entries: Sequence[Tensor], layouts: Sequence[Sequence[ImageLayout]]) -> Iterator[tuple[ImageLayout, Tensor]]:
    """Each layout with its rows (tokens, dim), from the entries of a model's image features."""
    for entry, own in zip(entries, layouts, strict=True):
        start = 0
        for layout in own:
            yield layout, entry[start : start + layout.tokens]
            start += layout.tokens
