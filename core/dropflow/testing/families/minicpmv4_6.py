"""MiniCPM-V 4.6 in miniature."""

from __future__ import annotations

from typing import Any

import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families.qwen3_5 import DELTA_NET, ROUND_OFF
from dropflow.testing.families.tiny import END, IMAGE, START, TEXT, VIDEO, VISION, Picture, Tiny, pixels

SIDE = 4
"""Pixels along one side of a patch."""


def tiny() -> Tiny:
    """A MiniCPM-V with pictures of 2 x 4 and 4 x 3 tokens, each of 4 x 4 patches, and a Qwen3.5 text decoder."""
    from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}

    def build() -> Any:
        config = MiniCPMV4_6Config(
            text_config={**TEXT, **DELTA_NET, "model_type": "qwen3_5_text", "rope_parameters": rope},
            vision_config={**VISION, "image_size": 64, "patch_size": SIDE},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            insert_layer_id=0,
        )
        return MiniCPMV4_6ForConditionalGeneration(config)

    return Tiny(build, {"image": packed_patches}, along_the_width, **ROUND_OFF)


def packed_patches(number: int, dice: torch.Generator) -> Picture:
    """A picture as its patches (patches, 3, 4, 4), which `along_the_width` joins."""
    rows, columns = ((2, 4), (4, 3))[number % 2]
    tokens = rows * columns
    arguments = {
        "pixel_values": pixels(dice, 16 * tokens, 3, SIDE, SIDE),
        "target_sizes": torch.tensor([[4 * rows, 4 * columns]], dtype=torch.int32),
    }
    return Picture([START, *[IMAGE] * tokens, END], arguments, [ImageLayout(tokens, (rows, columns))])


def along_the_width(inputs: dict[str, Any]) -> dict[str, Any]:
    """Lays the patches of all pictures side by side, (1, 3, 4, patches * 4), as the processor does."""
    if "pixel_values" not in inputs:
        return inputs
    patches = inputs["pixel_values"]
    return inputs | {"pixel_values": patches.permute(1, 2, 0, 3).reshape(1, 3, SIDE, -1)}
