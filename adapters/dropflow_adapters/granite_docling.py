"""Granite Docling: equal tiles, whose patches a connector joins into blocks, finely or coarsely by the call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dropflow import Backbone, ImageLayout, Projections, square_grid

FINER = 4
"""How many times more tokens a tile has if the call takes the fine path of the connector."""


class GraniteDocling(Backbone):
    """`GraniteDoclingForConditionalGeneration`; every tile is a separate image."""

    gridded = True

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:  # noqa: ARG002
        """One image per tile; each entry holds all tiles of a sample."""
        tile = int(self.core.image_seq_len) * (1 if arguments.get("tile_fine_mask") is None else FINER)
        return [[ImageLayout(tile, square_grid(tile))] * (size // tile) for size in sizes]

    def projections(self, layer: Any) -> Projections:
        """Llama's."""
        return Projections.of(layer.self_attn)
