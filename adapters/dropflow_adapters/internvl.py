"""InternVL: tiles of one size, four neighbouring patches shuffled into one token."""

from __future__ import annotations

from typing import Any

import torch

from dropflow import Backbone
from dropflow.backbone.backbone import square
from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.tiny import END, IMAGE, START, TEXT, VISION, Picture, Tiny, pixels


class InternVL(Backbone):
    """`InternVLForConditionalGeneration`; every tile (or frame of a video) is an image of its own."""

    @property
    def tokens_per_image(self) -> int:
        """Tokens of one tile."""
        config, vision = self.model.config, self.model.config.vision_config
        patches = (vision.image_size[0] // vision.patch_size[0]) * (vision.image_size[1] // vision.patch_size[1])
        return int(patches * config.downsample_ratio**2)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of shuffled patches."""
        return square(tokens)

    @classmethod
    def tiny(cls) -> Tiny:
        """An InternVL whose second image has two tiles."""
        from transformers import InternVLConfig, InternVLForConditionalGeneration

        def build() -> Any:
            config = InternVLConfig(
                text_config={**TEXT, "model_type": "qwen2"},
                vision_config={**VISION, "image_size": [36, 36], "patch_size": [6, 6]},
                image_token_id=IMAGE,
            )
            return InternVLForConditionalGeneration(config)

        def tiles(number: int, dice: torch.Generator) -> Picture:
            count = 1 + number % 2
            ids = [START, *[IMAGE] * (9 * count), END]
            return Picture(ids, {"pixel_values": pixels(dice, count, 3, 36, 36)}, [ImageLayout(9, (3, 3))] * count)

        return Tiny(build, {"image": tiles})
