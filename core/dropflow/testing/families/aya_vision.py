"""Aya Vision in miniature."""

from __future__ import annotations

from typing import Any

import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families.tiny import END, IMAGE, START, TEXT, VISION, Picture, Tiny, pixels


def tiny() -> Tiny:
    """An Aya Vision whose second image has two tiles, with a sliding window shorter than the prompt."""
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration

    def build() -> Any:
        config = AyaVisionConfig(
            text_config={**TEXT, "model_type": "cohere2", "sliding_window": 9},
            vision_config={**VISION, "image_size": 36, "patch_size": 6, "model_type": "siglip_vision_model"},
            image_token_index=IMAGE,
            alignment_intermediate_size=32,
        )
        return AyaVisionForConditionalGeneration(config)

    return Tiny(build, {"image": tiles})


def tiles(number: int, dice: torch.Generator) -> Picture:
    """An image of one or two tiles of 3 x 3 tokens."""
    count = 1 + number % 2
    ids = [START, *([5, *[IMAGE] * 9] * count), END]
    return Picture(ids, {"pixel_values": pixels(dice, count, 3, 36, 36)}, [ImageLayout(9, (3, 3))] * count)
