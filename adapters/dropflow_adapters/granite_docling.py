"""Granite Docling: equal tiles, whose patches a connector joins into blocks, finely or coarsely by the call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dropflow import Backbone, ImageLayout, Projections, VisionReader, patch_blocks, square_grid

FINER = 4
"""How many times more tokens a tile has if the call takes the fine path of the connector."""


class GraniteDocling(Backbone):
    """`GraniteDoclingForConditionalGeneration`; every tile is a separate image."""

    gridded = True

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:  # noqa: ARG002
        """One image per tile; each entry holds all tiles of a sample."""
        tile = self._tile(arguments)
        return [[ImageLayout(tile, square_grid(tile))] * (size // tile) for size in sizes]

    def projections(self, layer: Any) -> Projections:
        """Llama's."""
        return Projections.of(layer.self_attn)

    def reader(self, modality: str = "image") -> VisionReader:  # noqa: ARG002
        """The tower: the patches of each tile, of which every square of neighbours becomes a token."""
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size

        def members(sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[Tensor]:
            tokens = self._tile(arguments)
            tile = patch_blocks((side, side), round((side**2 / tokens) ** 0.5))
            table = torch.cat([tile + number * side**2 for number in range(sum(sizes) // tokens)])
            return list(torch.split(table, list(sizes)))

        return VisionReader(self.core.vision_model.encoder, members)

    def _tile(self, arguments: Mapping[str, Any]) -> int:
        """Tokens of a tile, by the path of the connector that a call takes."""
        return int(self.core.image_seq_len) * (1 if arguments.get("tile_fine_mask") is None else FINER)
