"""Idefics3 and SmolVLM: equal tiles, each preceded by its position; a pixel shuffle joins neighbouring patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dropflow import Backbone, ImageLayout, VisionReader, patch_blocks, square_grid


class Idefics3(Backbone):
    """`Idefics3ForConditionalGeneration`; every tile is a separate image."""

    @property
    def tokens_per_image(self) -> int:
        """Number of tokens in a tile."""
        return int(self._side**2 / self.model.config.scale_factor**2)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of patches after the pixel shuffle."""
        return square_grid(tokens)

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:  # noqa: ARG002
        """One image per tile; each entry holds all tiles of a sample."""
        tile = self.tokens_per_image
        return [[ImageLayout(tile, self.grid(tile))] * (size // tile) for size in sizes]

    def reader(self, modality: str = "image") -> VisionReader:  # noqa: ARG002
        """The tower: the patches of each tile, of which every square of neighbours becomes a token."""

        def members(sizes: Sequence[int], _: Mapping[str, Any]) -> list[Tensor]:
            tile, count = patch_blocks((self._side, self._side), self.model.config.scale_factor), sum(sizes)
            table = torch.cat([tile + number * self._side**2 for number in range(count // len(tile))])
            return list(torch.split(table, list(sizes)))

        return VisionReader(self.core.vision_model.encoder, members)

    @property
    def _side(self) -> int:
        """Patches along one side of a tile."""
        vision = self.model.config.vision_config
        return int(vision.image_size // vision.patch_size)


class SmolVLM(Idefics3):
    """`SmolVLMForConditionalGeneration`; every tile or video frame is a separate image, and the caller says which."""

    unstated_videos = frozenset({"image"})
