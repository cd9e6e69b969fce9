"""The rows that stages merged in one call, so that what an earlier layer says of them can be told of the new rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dropflow.engine.vision.rows import Rows
from dropflow.errors import DecisionError
from dropflow.lifecycle.payloads import Encode


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


class Merges:
    """All merges of one call, in order; `Rows.rewritten` counts those that came before."""

    def __init__(self) -> None:
        self._merges: list[_Merge] = []

    def add(self, name: str, before: Sequence[Rows], after: Sequence[Rows], answer: Encode) -> None:
        """Note that the stage `name` has replaced the rows of each image."""
        old, new = (tuple(rows.places for rows in own) for own in (before, after))
        self._merges.append(_Merge(name, old, new, answer.shares))

    def followed(
        self, image: int, table: Int[Tensor, "then members"], then: Rows, now: Rows
    ) -> Int[Tensor, "now members"]:
        """A table of the rows that an image had, followed to its present rows; -1 fills up.

        Raises `DecisionError` where a stage has merged rows since without saying of which.
        """
        places = then.places
        for merge in self._merges[then.rewritten :]:
            if merge.shares is None:
                raise DecisionError(
                    f"attention of the vision encoder: stages.{merge.name} has merged rows since that layer ran, "
                    "without saying which; give `Encode.shares` there, or ask before it"
                )
            device = merge.before[image].device
            own = table.to(device)[torch.searchsorted(places.to(device), merge.before[image])]
            table = _united(own, merge.shares()[image][:, : len(own)])
            places = merge.after[image]
        device = now.places.device
        return table.to(device)[torch.searchsorted(places.to(device), now.places)]


def _united(table: Int[Tensor, "old members"], shares: Tensor) -> Int[Tensor, "new members"]:
    """The members of new rows: those of all old rows that have a share (new, old) in them."""
    has = shares.to(table.device) != 0
    most = int(has.sum(1).max()) if has.numel() else 0
    order = torch.argsort((~has).to(torch.uint8), dim=1, stable=True)[:, :most]
    return torch.where(has.gather(1, order)[:, :, None], table[order], -1).flatten(1)
