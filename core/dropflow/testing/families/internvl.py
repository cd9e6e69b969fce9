"""InternVL in miniature."""

from __future__ import annotations

from typing import Any

import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families.tiny import END, IMAGE, START, TEXT, VISION, Picture, Tiny, pixels


def tiny() -> Tiny:
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
