"""Mistral 3 in miniature."""

from __future__ import annotations

from typing import Any

import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families.tiny import END, IMAGE, START, TEXT, VISION, Picture, Tiny, pixels


def tiny() -> Tiny:
    """A Mistral 3 with images of 2 x 4 and 4 x 4 tokens and a break after every row."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    def build() -> Any:
        config = Mistral3Config(
            text_config={**TEXT, "head_dim": 8, "model_type": "mistral", "sliding_window": None},
            vision_config={**VISION, "head_dim": 8, "image_size": 32, "patch_size": 4, "model_type": "pixtral"},
            image_token_id=IMAGE,
            vision_feature_layer=-1,
            spatial_merge_size=2,
        )
        return Mistral3ForConditionalGeneration(config)

    def picture(number: int, dice: torch.Generator) -> Picture:
        rows, columns = (2 + 2 * (number % 2), 4)
        size = torch.tensor([[8 * rows, 8 * columns]])
        padded = torch.nn.functional.pad(pixels(dice, 1, 3, 8 * rows, 32), (0, 0, 0, 32 - 8 * rows))
        ids = ([IMAGE] * columns + [START]) * (rows - 1) + [IMAGE] * columns + [END]
        return Picture(
            ids, {"pixel_values": padded, "image_sizes": size}, [ImageLayout(rows * columns, (rows, columns))]
        )

    return Tiny(build, {"image": picture})
