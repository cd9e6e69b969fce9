"""Vision towers that run the pictures of a call as one packed sequence, and the tables that place its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dropflow.backbone.vision_reader import listed_layers


@dataclass(frozen=True)
class PackedTables:
    """What a packed tower computes from the grids of its pictures, and lets callers hand over instead, by argument.

    All tables are those of the whole pictures.
    """

    rows: Mapping[str, Tensor]
    """Tables (rows, ...) with an entry for every row, in the order of the pixels."""
    borders: Mapping[str, Int[Tensor, "segments_plus_1"]]
    """Tables of the rows at which segments of attention begin, from 0 to the number of rows, in the blocks' order."""
    order: tuple[str, Int[Tensor, "units"]] | None = None
    """Name and contents of the table that says which unit stands at each place of the blocks' order; `None` where
    blocks see units in the order of the pixels."""

    @property
    def named(self) -> dict[str, Tensor]:
        """All tables, by argument of the tower."""
        order = {} if self.order is None else dict([self.order])
        return {**self.rows, **self.borders, **order}

    def given(self, arguments: Mapping[str, Any]) -> PackedTables:
        """These tables, with those that a caller has handed over among `arguments` in their places."""
        own = {name: arguments[name] for name in self.named if arguments.get(name) is not None}
        return PackedTables(
            {name: own.get(name, table) for name, table in self.rows.items()},
            {name: own.get(name, table) for name, table in self.borders.items()},
            None if self.order is None else (self.order[0], own.get(*self.order)),
        )

    def cut(self, units: Int[Tensor, "kept"], unit: int) -> PackedTables:
        """The tables of a run on these units alone (ascending), of `unit` rows each."""
        rows = {name: table[rows_of(units.to(table.device), unit)] for name, table in self.rows.items()}
        if self.order is None:
            return PackedTables(rows, self._cut_borders(units, unit))
        name, order = self.order
        kept = units.to(order.device)
        rank = torch.full_like(order, -1).index_copy(0, kept, torch.arange(len(kept), device=order.device))
        places = torch.argsort((rank[order] < 0).to(torch.uint8), stable=True)[: len(kept)]  # no wait for the device
        return PackedTables(rows, self._cut_borders(places, unit), (name, rank[order][places]))

    def _cut_borders(self, places: Tensor, unit: int) -> dict[str, Tensor]:
        return {name: cut_borders(table, places, unit) for name, table in self.borders.items()}


def rows_of(units: Int[Tensor, "units"], unit: int) -> Int[Tensor, "rows"]:
    """The rows of these units, of `unit` rows each."""
    return (units[:, None] * unit + torch.arange(unit, device=units.device)).flatten()


def cut_borders(
    borders: Int[Tensor, "segments_plus_1"], places: Int[Tensor, "kept"], unit: int
) -> Int[Tensor, "left_plus_1"]:
    """Borders of the segments after all units but those at `places` (ascending) are gone; empty segments are left out.

    Borders are counted in rows, `unit` of them per unit, and fall between units.
    """
    before: Tensor = torch.searchsorted(places.to(borders.device) * unit, borders.long())
    left: Tensor = torch.unique_consecutive(before * unit)
    return left.to(borders.dtype)


@dataclass(frozen=True)
class PackedTower:
    """A vision tower whose rows are the patches of all pictures of a call, one picture after the other.

    Patches that a merger joins to one token are neighbours in the sequence: a *unit*. A segment of attention, such as
    a picture or a window, holds whole units.
    """

    owner: Any
    """Module that is called with the pixels of every patch, and holds the blocks."""
    unit: int
    """Patches that become one token."""
    mergers: tuple[Any, ...]
    """Modules that join the rows of every unit: (units * unit, width) to (units, other width)."""
    sizes: Callable[[Mapping[str, Any]], Sequence[int]]
    """Units of every entry of the features, from the arguments of the owner's forward by name."""
    tables: Callable[[Mapping[str, Any]], PackedTables]
    """Makes the tables of a call from the same arguments."""
    blocks: str = "blocks"
    """Name of the list of blocks in the owner."""
    pixels: str = "hidden_states"
    """Name of the owner's argument with the pixels (rows, channels * times * height * width)."""
    block_rows: tuple[str, ...] = ("position_embeddings",)
    """Arguments of a block that have an entry for every row, or are tuples of such."""
    block_borders: tuple[str, ...] = ("cu_seqlens",)
    """Arguments of a block with the borders of its segments."""
    block_others: tuple[str, ...] = ("max_seqlen",)
    """Arguments of a block that stay right when rows are gone, such as an upper bound of the segments' lengths."""

    @property
    def depth(self) -> int:
        """Blocks of the tower."""
        return len(listed_layers(self.owner, self.blocks))
