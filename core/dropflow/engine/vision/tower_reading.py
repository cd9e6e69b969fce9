"""Reads the attention of a vision tower in which nothing is changed, for stages after the projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor

from dropflow.backbone.image_layout import ImageLayout, split
from dropflow.engine.model.attention import QueryKey
from dropflow.engine.vision.tower_layer import TowerLayer, segments
from dropflow.errors import UnsupportedModel

if TYPE_CHECKING:
    from dropflow.backbone.vision_reader import VisionReader


class TowerReading:
    """What one call of a tower shows, and the tower rows of which the rows after the projector are made."""

    def __init__(self, reader: VisionReader, arguments: Mapping[str, Any]) -> None:
        """`arguments` are those of the core's method that encodes."""
        self.reader, self._arguments = reader, arguments
        self._calls: dict[int, list[QueryKey]] = {}
        self._entries: list[int] = []
        self._layouts: list[list[ImageLayout]] = []
        self._layers: dict[int, TowerLayer] = {}
        self._members: tuple[Tensor, ...] | None = None

    def keep(self, number: int, seen: QueryKey) -> None:
        """Keep q and k of a layer, which may compute its attention in several parts."""
        self._calls.setdefault(number, []).append(seen)

    def begin(self, sizes: Sequence[int], layouts: Sequence[Sequence[ImageLayout]]) -> None:
        """Note the rows of each entry of the features and the images in it."""
        self._entries, self._layouts = list(sizes), [list(own) for own in layouts]

    def layer(self, number: int) -> TowerLayer | None:
        """A layer that was tapped; `None` for one that was not, or has not run."""
        if number in self._calls and number not in self._layers:
            self._layers[number] = self._made(number, self._calls[number])
        return self._layers.get(number)

    def members(self, layer: TowerLayer) -> tuple[Int[Tensor, "patches members"], ...]:
        """For the patches of each image the numbers of the tower rows they are made of, -1 for none."""
        if self._members is None:
            tables = self.reader.members(self._entries, self._arguments)
            told = [len(table) for table in tables]
            self._check(told == self._entries, f"entries of {told} rows in `members`", layer)
            highest = max((int(table.max()) for table in tables if table.numel()), default=-1)
            self._check(highest < layer.rows, f"row {highest} in `members`", layer)
            own = split(tables, self._layouts)
            self._members = tuple(table[layout.patch_rows(table.device)] for layout, table in own)
        return self._members

    def weights(self, layer: TowerLayer) -> tuple[Float[Tensor, "patches members"], ...] | None:
        """The weights of `members` in their patches; `None` where all of a patch weigh the same."""
        if self.reader.weights is None:
            return None
        shapes = [table.shape for table in self.members(layer)]
        tables = self.reader.weights(self._entries, self._arguments)
        told = [len(table) for table in tables]
        self._check(told == self._entries, f"entries of {told} rows in `weights`", layer)
        found = tuple(table[layout.patch_rows(table.device)] for layout, table in split(tables, self._layouts))
        self._check([table.shape for table in found] == shapes, "other shapes in `weights` than in `members`", layer)
        return found

    def _made(self, number: int, calls: list[QueryKey]) -> TowerLayer:
        stated = self.reader.pictures
        counts = None if stated is None else tuple(map(int, stated(self._arguments)))
        if counts is not None and not self.reader.padded:
            found = TowerLayer(segments(calls, counts), counts, packed=True)
            self._check(sum(counts) == found.rows, f"{sum(counts)} rows in `pictures`", found)
            return found
        if len(calls) > 1:
            raise UnsupportedModel(
                f"vision layer {number}: computed its attention {len(calls)} times in one call, but the adapter states "
                "no `pictures` in its `reader`; state the rows of each picture"
            )
        batch, prefix = calls[0], self.reader.prefix
        patches = batch.key.shape[2] - prefix
        found = TowerLayer(tuple(calls), (patches,) * len(batch.key) if counts is None else counts, prefix)
        fits = len(found.counts) == len(batch.key) and max(found.counts, default=0) <= patches
        self._check(fits, f"pictures of {list(found.counts)} rows in `pictures`", found)
        return found

    def _check(self, fits: bool, what: str, layer: TowerLayer) -> None:
        if not fits:
            raise UnsupportedModel(
                f"{type(self.reader.owner).__name__}: the adapter's `reader` states {what}, but the features have "
                f"entries of {self._entries} rows, and the tower has {layer.rows}; correct the adapter"
            )
