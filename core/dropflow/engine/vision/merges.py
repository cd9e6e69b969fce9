"""The rows that stages merged in one call, so that what an earlier layer says of them can be told of the new rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, Num
from torch import Tensor
from torch.nn.functional import pad

from dropflow.engine.vision.rows import Rows
from dropflow.errors import DecisionError
from dropflow.lifecycle.payloads import Encode
from dropflow.lifecycle.videos import Frames


@dataclass(frozen=True, eq=False)
class _Merge:
    """A decision that made new rows of old ones."""

    name: str
    """Name of the stage."""
    before: tuple[Int[Tensor, "rows"], ...]
    """Places of the rows of each image before it."""
    after: tuple[Int[Tensor, "rows"], ...]
    """Places of the rows of each image after it."""
    shares: Callable[[], Sequence[Tensor]] | None
    videos: Frames
    """Videos whose frames' new rows are made of the old rows of all frames."""

    def old(self, tables: Sequence[Num[Tensor, "old members"]]) -> list[Num[Tensor, "columns members"]]:
        """For each image, the `tables` of the old rows that the columns of its `shares` stand for."""
        found = list(tables)
        for frames in self.videos:
            width = max(tables[frame].shape[1] for frame in frames)
            joint = torch.cat([pad(tables[frame], (0, width - tables[frame].shape[1]), value=-1) for frame in frames])
            for frame in frames:
                found[frame] = joint
        return found


class Merges:
    """All merges of one call, in order; `Rows.rewritten` counts those that came before."""

    def __init__(self) -> None:
        self._merges: list[_Merge] = []

    def add(self, name: str, before: Sequence[Rows], after: Sequence[Rows], answer: Encode, videos: Frames) -> None:
        """Note that the stage `name` has replaced the rows of each image; `videos` are those of the call."""
        old, new = (tuple(rows.places for rows in own) for own in (before, after))
        self._merges.append(_Merge(name, old, new, answer.shares, videos if answer.across_frames else ()))

    def followed(
        self, tables: Sequence[Num[Tensor, "then members"]], then: Sequence[Rows], now: Sequence[Rows]
    ) -> tuple[Num[Tensor, "now members"], ...]:
        """Tables of the rows that each image had (members, or weights), followed to its present rows; -1 fills up.

        Raises `DecisionError` where a stage has merged rows since without saying of which.
        """
        places = [rows.places for rows in then]
        for merge in self._merges[max((rows.rewritten for rows in then), default=0) :]:
            if merge.shares is None:
                raise DecisionError(
                    f"attention of the vision encoder: stages.{merge.name} has merged rows since that layer ran, "
                    "without saying which; give `Encode.shares` there, or ask before it"
                )
            own = merge.old(list(map(_taken, tables, places, merge.before)))
            tables = [_united(rows, share[:, : len(rows)]) for rows, share in zip(own, merge.shares(), strict=True)]
            places = list(merge.after)
        return tuple(map(_taken, tables, places, (rows.places for rows in now)))


def _taken(table: Tensor, places: Tensor, wanted: Tensor) -> Num[Tensor, "wanted members"]:
    """The rows of a table, one for each of `places` (ascending), that are at the `wanted` ones."""
    return table.to(wanted.device)[torch.searchsorted(places.to(wanted.device), wanted)]


def _united(table: Num[Tensor, "old members"], shares: Tensor) -> Num[Tensor, "new members"]:
    """The members of new rows: those of all old rows that have a share (new, old) in them."""
    has = shares.to(table.device) != 0
    most = int(has.sum(1).max()) if has.numel() else 0
    order = torch.argsort((~has).to(torch.uint8), dim=1, stable=True)[:, :most]
    return torch.where(has.gather(1, order)[:, :, None], table[order], -1).flatten(1)
