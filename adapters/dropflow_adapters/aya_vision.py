"""Aya Vision: equal tiles, in which a pixel shuffle joins neighbouring SigLIP patches into one token."""

from __future__ import annotations

from dropflow import Backbone, square_grid


class AyaVision(Backbone):
    """`AyaVisionForConditionalGeneration`; every tile is a separate image."""

    @property
    def tokens_per_image(self) -> int:
        """Number of tokens in a tile."""
        config, tower = self.model.config, self.model.config.vision_config
        return int((tower.image_size // tower.patch_size // config.downsample_factor) ** 2)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of patches after the pixel shuffle."""
        return square_grid(tokens)
