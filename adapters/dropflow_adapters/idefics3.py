"""Idefics3 and SmolVLM: equal tiles, each preceded by its position; a pixel shuffle joins neighbouring patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dropflow import Backbone, ImageLayout, square_grid


class Idefics3(Backbone):
    """`Idefics3ForConditionalGeneration` and `SmolVLMForConditionalGeneration`; every tile is a separate image."""

    @property
    def tokens_per_image(self) -> int:
        """Number of tokens in a tile."""
        config, vision = self.model.config, self.model.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2 / config.scale_factor**2)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of patches after the pixel shuffle."""
        return square_grid(tokens)

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:  # noqa: ARG002
        """One image per tile; each entry holds all tiles of a sample."""
        tile = self.tokens_per_image
        return [[ImageLayout(tile, self.grid(tile))] * (size // tile) for size in sizes]
