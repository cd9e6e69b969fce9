"""One pass through a packed vision tower under a policy: whole units are left out before it, or before its blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dropflow.backbone.packed_tower import cut_borders, rows_of
from dropflow.engine.model.arguments import hidden_of, parameters_of, with_hidden
from dropflow.errors import UnsupportedModel

if TYPE_CHECKING:
    from dropflow.backbone.packed_tower import PackedTower
    from dropflow.lifecycle.stage import EncodeBoundary

PUT_BACK = ("pooler_output", "deepstack_features")
"""Fields of a tower's output with a row per unit, or lists of such; cores split them by the grids of whole pictures."""


class Decide(Protocol):
    """Asks the stages of one place about the units that are present."""

    def __call__(
        self, boundary: EncodeBoundary, units: Float[Tensor, "units width"]
    ) -> tuple[Float[Tensor, "left width"], Int[Tensor, "left"]] | None:
        """The units that stay, in the order of the pixels, and their numbers among the present ones, ascending.

        `None` where nothing changes.
        """
        ...


class PackedRun:
    """The units that run in one call of a packed tower.

    Blocks may see units in another order than that of the pixels. A *place* is a position in the blocks' order among
    the units that entered the tower.
    """

    def __init__(self, tower: PackedTower, decide: Decide, boundaries: frozenset[EncodeBoundary]) -> None:
        """`decide` asks the stages, which work at `boundaries`."""
        self.tower, self._decide, self._boundaries = tower, decide, boundaries
        self.ran = False
        """Whether the tower has been called."""
        self._alone = False
        """Whether no unit is left, so that one runs whose row nobody reads: no tower runs on nothing."""
        self._entered = 0
        """Number of units that entered the tower."""
        self._order: Tensor | None = None
        """For each place, the rank of its unit in the order of the pixels; `None` where the orders are the same."""
        self._left: Tensor | None = None
        """The places that are present, ascending; `None` for all."""
        self._cuts: dict[int, tuple[Any, Any]] = {}
        """Arguments of blocks that were cut to these places, by identity, with what they became."""

    def check_ran(self) -> None:
        """Raise `UnsupportedModel` if the images were encoded without a call of the tower."""
        if not self.ran:
            raise UnsupportedModel(
                f"{type(self.tower.owner).__name__}: the model encoded images without calling it, so no stage could "
                "leave units out; correct the adapter's `packed_tower`"
            )

    def forward(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """The tower's output for whole pictures, with zeros for units that the stages left out before it."""
        self.ran = True
        tower, pixels = self.tower, arguments[self.tower.pixels]
        total, kept = len(pixels) // tower.unit, None
        if "pixels" in self._boundaries:
            units = pixels.reshape(total, -1)
            decided = self._decide("pixels", units)
            if decided is not None:
                units, kept = decided
                if not len(kept):
                    self._alone, kept, units = True, kept.new_zeros(1), pixels.reshape(total, -1)[:1]
        tables = tower.tables(arguments).given(arguments)
        if kept is not None:
            tables = tables.cut(kept, tower.unit)
            rows = units.reshape(len(kept) * tower.unit, -1)
            arguments = {**arguments, **tables.named, tower.pixels: rows}
        self._entered = total if kept is None else len(kept)
        self._order = None if tables.order is None else tables.order[1]
        output = forward(**arguments)
        if kept is not None:
            for name in PUT_BACK:
                value = output.get(name)
                if isinstance(value, Tensor):
                    output[name] = self._put_back(value, kept, total)
                elif value is not None:
                    output[name] = [self._put_back(rows, kept, total) for rows in value]
        return output

    def layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block on the units that are present."""
        if number in self._boundaries:
            args, kwargs = with_hidden(self._decided_before(number, hidden_of(args, kwargs)), args, kwargs)
        if self._left is not None:
            named = dict(zip(parameters_of(layer)[1 : len(args)], args[1:], strict=True)) | kwargs
            args, kwargs = args[:1], {name: self._cut(name, value) for name, value in named.items()}
        return layer(*args, **kwargs)

    def merged(self, rows: Float[Tensor, "left width"]) -> Float[Tensor, "entered width"]:
        """What a merger made of the units that are present, with zeros for those left out since the tower began."""
        return rows if self._left is None else self._put_back(rows, self._left, self._entered)

    def _decided_before(self, number: int, hidden: Float[Tensor, "rows dim"]) -> Float[Tensor, "left_rows dim"]:
        states = hidden.reshape(len(hidden) // self.tower.unit, -1)  # as the merger views them
        if self._alone:
            self._decide(number, states[:0])
            return hidden
        left = torch.arange(self._entered, device=hidden.device) if self._left is None else self._left
        ranked = left if self._order is None else self._order.to(left.device)[left].argsort()  # place of each unit
        ranked = torch.arange(len(left), device=left.device) if self._order is None else ranked
        decided = self._decide(number, states if self._order is None else states[ranked])
        if decided is None:
            return hidden
        units, kept = decided
        if not len(kept):
            self._alone, kept, units = True, kept.new_zeros(1), states[ranked[:1]]
        places = ranked[kept.to(ranked.device)]
        back = places.argsort()
        self._left, self._cuts = left[places[back]], {}
        return units[back].reshape(-1, hidden.shape[-1])

    def _cut(self, name: str, value: Any) -> Any:
        """An argument of a block for the units that are present."""
        rows, borders = name in self.tower.block_rows, name in self.tower.block_borders
        if value is None or not (rows or borders):
            return value
        if id(value) not in self._cuts:
            self._cuts[id(value)] = (value, self._cut_rows(value) if rows else self._cut_segments(value))
        return self._cuts[id(value)][1]

    def _cut_rows(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._cut_rows, value))
        assert self._left is not None
        return value[rows_of(self._left.to(value.device), self.tower.unit)]

    def _cut_segments(self, borders: Tensor) -> Tensor:
        assert self._left is not None
        return cut_borders(borders, self._left, self.tower.unit)

    def _put_back(self, rows: Tensor, units: Tensor, total: int) -> Tensor:
        if len(rows) != len(units):
            raise UnsupportedModel(
                f"{type(self.tower.owner).__name__}: returned {len(rows)} rows for {len(units)} units; correct the "
                "adapter's `packed_tower`"
            )
        return rows.new_zeros(total, *rows.shape[1:]).index_copy(0, units.to(rows.device), rows)
