"""InternVL: equal tiles, in which a pixel shuffle joins four neighbouring patches into one token."""

from __future__ import annotations

from dropflow import Backbone, square_grid


class InternVL(Backbone):
    """`InternVLForConditionalGeneration`; every tile or video frame is a separate image."""

    @property
    def tokens_per_image(self) -> int:
        """Number of tokens in a tile."""
        config, vision = self.model.config, self.model.config.vision_config
        patches = (vision.image_size[0] // vision.patch_size[0]) * (vision.image_size[1] // vision.patch_size[1])
        return int(patches * config.downsample_ratio**2)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of patches after the pixel shuffle."""
        return square_grid(tokens)
