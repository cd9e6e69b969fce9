"""LFM2-VL in miniature."""

from __future__ import annotations

from typing import Any

import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families.tiny import END, IMAGE, START, TEXT, VISION, Picture, Tiny, pixels

PATCHES = 48
"""Rows to which the processor pads the patches of every picture."""


def tiny() -> Tiny:
    """An LFM2-VL with pictures of 2 x 4 and 4 x 3 tokens, each of 2 x 2 patches, and short convolutions."""
    from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

    text = {
        **TEXT,
        "model_type": "lfm2",
        "layer_types": ["conv", "full_attention", "conv", "full_attention", "full_attention", "conv"],
    }
    vision = {**VISION, "model_type": "siglip2_vision_model", "patch_size": 4, "num_patches": 64}

    def build() -> Any:
        config = Lfm2VlConfig(
            text_config=text,
            vision_config=vision | {"vision_use_head": False},
            image_token_id=IMAGE,
            projector_hidden_size=32,
            tie_word_embeddings=False,
        )
        return Lfm2VlForConditionalGeneration(config)

    return Tiny(build, {"image": padded_image})


def padded_image(number: int, dice: torch.Generator) -> Picture:
    """A picture whose patches of 3 x 4 x 4 pixels are padded to `PATCHES` rows."""
    rows, columns = ((2, 4), (4, 3))[number % 2]
    count = 4 * rows * columns
    values = torch.zeros(1, PATCHES, 3 * 4 * 4)
    values[0, :count] = pixels(dice, count, 3 * 4 * 4)
    arguments = {
        "pixel_values": values,
        "spatial_shapes": torch.tensor([[2 * rows, 2 * columns]]),
        "pixel_attention_mask": (torch.arange(PATCHES) < count).int()[None],
    }
    tokens = rows * columns
    return Picture([START, *[IMAGE] * tokens, END], arguments, [ImageLayout(tokens, (rows, columns))])
