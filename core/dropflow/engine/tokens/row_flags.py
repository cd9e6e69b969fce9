"""The flags that the engine keeps for every row of image features, and how they travel through transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow.backbone.image_layout import ImageLayout
from dropflow.engine.tokens.host import read

_KEPT, _PROTECTED, _IMAGE, _LINE, _EXTRA, _TOWER, _VIDEO, _OWNER, _IMAGES, _LINES, _PLAN, _CARRIED = range(12)
"""Columns of a packed table; numbers carried for stages begin at the last one."""


@dataclass(frozen=True, eq=False)
class RowFlags:
    """Flags of the rows of image features, in the order of their placeholders."""

    kept: Bool[Tensor, "rows"]
    """False for rows that an `encode` stage dropped."""
    protected: Bool[Tensor, "rows"]
    """Rows that no stage may drop."""
    image: Int[Tensor, "rows"]
    """Number of the image, starting at 0."""
    line: Int[Tensor, "rows"]
    """Number of the line within the image (see `ImageLayout`)."""
    extra: Bool[Tensor, "rows"]
    """Rows that are not patches, such as newlines."""
    carried: Float[Tensor, "rows carries"]
    """Numbers that stages attached to the row (`Plan.carries` gives each stage's columns)."""
    tower: Float[Tensor, "rows"]
    """Share of the vision tower's layers that ran on the row."""
    video: Int[Tensor, "rows"]
    """Number of the video, starting at 0; -1 for rows of pictures, and where no stage works on videos."""
    owner: Int[Tensor, "rows"]
    """Number of the image among whose lines that of the row is: its own, or the last one of an entry that is one line
    (`ImageLayout.closes`)."""
    images: int
    """Upper bound (exclusive) of the image numbers, and so of those of videos."""
    lines: int
    """Upper bound (exclusive) of the line numbers; 0 if no image has extra rows."""
    plan: int
    """`Plan.serial` of the policy under which the rows were encoded."""

    def __len__(self) -> int:
        return self.image.shape[0]

    @classmethod
    def of(
        cls,
        layouts: Sequence[ImageLayout],
        first: int,
        plan: int,
        device: torch.device,
        kept: Sequence[Bool[Tensor, "patches"]] | None = None,
        protected: Sequence[Bool[Tensor, "patches"]] | None = None,
        carried: Sequence[Float[Tensor, "patches carries"]] = (),
        tower: Sequence[Float[Tensor, "patches"]] | None = None,
        carries: int = 0,
        videos: Mapping[int, int] = MappingProxyType({}),
    ) -> RowFlags:
        """Flags of the rows of `layouts`, numbered from `first`; by default, patches are kept and not protected, carry
        `carries` zeros, and the whole tower ran on them. `videos` maps numbers of images to those of videos, where
        they are frames."""
        empty = torch.zeros(0, dtype=torch.long, device=device)
        none = torch.zeros(0, carried[0].shape[1] if carried else carries, device=device)
        last = first + len(layouts)
        whole = cls(
            empty.bool(), empty.bool(), empty, empty, empty.bool(), none, empty.float(), empty, empty, last, 0, plan
        )
        parts = [
            _of_one(
                layout,
                first + number,
                whole,
                None if kept is None else kept[number],
                None if protected is None else protected[number],
                carried[number] if carried else None,
                None if tower is None else tower[number],
                videos.get(first + number, -1),
            )
            for number, layout in enumerate(layouts)
        ]
        return whole.joined(_one_line(parts, last - 1) if layouts and layouts[-1].closes else parts)

    def joined(self, parts: Sequence[RowFlags]) -> RowFlags:
        """These rows and those of `parts`, one after the other."""
        every = [self, *parts]
        return RowFlags(
            kept=torch.cat([part.kept for part in every]),
            protected=torch.cat([part.protected for part in every]),
            image=torch.cat([part.image for part in every]),
            line=torch.cat([part.line for part in every]),
            extra=torch.cat([part.extra for part in every]),
            carried=torch.cat([part.carried for part in every]),
            tower=torch.cat([part.tower for part in every]),
            video=torch.cat([part.video for part in every]),
            owner=torch.cat([part.owner for part in every]),
            images=max(part.images for part in every),
            lines=max(part.lines for part in every),
            plan=self.plan,
        )

    def pack(self, whole: RowFlags) -> Int[Tensor, "rows columns"]:
        """A table of integers, safe from mixed-precision rounding; `whole` are the flags of which these are a part."""
        shape = len(self), _CARRIED + self.carried.shape[1]
        table = torch.zeros(shape, dtype=torch.long, device=self.image.device)
        table[:, _KEPT], table[:, _PROTECTED], table[:, _EXTRA] = self.kept, self.protected, self.extra
        table[:, _IMAGE], table[:, _LINE], table[:, _VIDEO] = self.image, self.line, self.video
        table[:, _OWNER] = self.owner
        table[:, _CARRIED:] = self.carried.float().view(torch.int32)  # bit pattern of the floats
        table[:, _TOWER] = self.tower.float().view(torch.int32)
        table[:, _IMAGES], table[:, _LINES], table[:, _PLAN] = whole.images, whole.lines, whole.plan
        return table

    @classmethod
    def unpack(cls, table: Int[Tensor, "rows columns"], known: RowFlags | None = None) -> RowFlags:
        """The flags in a packed table, whose rows may have been repeated or removed since.

        `known` are the flags it was packed from; without them, the numbers that the host needs are read from the table.
        """
        images, lines, plan = (known.images, known.lines, known.plan) if known is not None else (0, 0, 0)
        if known is None and len(table):
            ((images, lines, plan),) = read(table[0, _IMAGES:_CARRIED])
        return cls(
            kept=table[:, _KEPT] > 0,
            protected=table[:, _PROTECTED] > 0,
            image=table[:, _IMAGE],
            line=table[:, _LINE],
            extra=table[:, _EXTRA] > 0,
            carried=table[:, _CARRIED:].int().view(torch.float32),
            tower=table[:, _TOWER].int().view(torch.float32),
            video=table[:, _VIDEO],
            owner=table[:, _OWNER],
            images=images,
            lines=lines,
            plan=plan,
        )


def _of_one(
    layout: ImageLayout,
    number: int,
    like: RowFlags,
    kept: Bool[Tensor, "patches"] | None,
    protected: Bool[Tensor, "patches"] | None,
    carried: Float[Tensor, "patches carries"] | None,
    tower: Float[Tensor, "patches"] | None,
    video: int,
) -> RowFlags:
    device = like.image.device
    patch = layout.patch_rows(device)
    plain = torch.zeros(layout.tokens, dtype=torch.bool, device=device)
    own = replace(
        like,
        kept=~plain if kept is None else layout.keep_of(kept),
        protected=plain if protected is None else plain.index_copy(0, patch, protected),
        image=torch.full((layout.tokens,), number, device=device),
        line=torch.zeros(layout.tokens, dtype=torch.long, device=device),
        extra=plain,
        carried=like.carried.new_zeros(layout.tokens, like.carried.shape[1]),
        tower=torch.ones(layout.tokens, device=device),
        video=torch.full((layout.tokens,), video, device=device),
        owner=torch.full((layout.tokens,), number, device=device),
    )
    if tower is not None:
        own = replace(own, tower=own.tower.index_copy(0, patch, tower.to(own.tower)))
    if carried is not None:
        own = replace(own, carried=own.carried.index_copy(0, patch, carried.to(own.carried)))
    if layout.has_extra:
        own = replace(own, extra=layout.extra(device), line=layout.line(device), lines=layout.lines)
    return own


def _one_line(parts: Sequence[RowFlags], last: int) -> list[RowFlags]:
    """Parts of an entry whose last image, number `last`, ends with rows that stay as long as any patch of the entry."""
    alive = torch.cat([part.kept & ~part.extra for part in parts]).any()
    parts = [replace(part, owner=torch.full_like(part.owner, last)) for part in parts]
    end = parts[-1]
    return [*parts[:-1], replace(end, kept=torch.where(end.extra, alive, end.kept))]
