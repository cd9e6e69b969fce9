"""Granite Docling in miniature."""

from __future__ import annotations

from typing import Any

import torch

from dropflow.testing.families.idefics3 import by_sample, tiles
from dropflow.testing.families.tiny import IMAGE, TEXT, VISION, Tiny


def tiny() -> Tiny:
    """A Granite Docling whose second image has two tiles of 3 x 3 tokens, with two deepstack layers."""
    from transformers import GraniteDoclingConfig, GraniteDoclingForConditionalGeneration

    vision = {**VISION, "image_size": 36, "patch_size": 6, "scale_factor": 2, "deepstack_visual_indexes": [0, 1]}

    def build() -> Any:
        config = GraniteDoclingConfig(
            text_config={**TEXT, "attention_multiplier": 8**-0.5},
            vision_config=vision | {"out_hidden_size": TEXT["hidden_size"], "use_fine_route": False},
            image_token_id=IMAGE,
            pad_token_id=0,
        )
        return GraniteDoclingForConditionalGeneration(config)

    return Tiny(build, {"image": tiles}, with_tiles)


def with_tiles(inputs: dict[str, Any]) -> dict[str, Any]:
    """Tiles by sample, and which of them are not padding."""
    inputs = by_sample(inputs)
    if "pixel_values" not in inputs:
        return inputs
    counts = (inputs["input_ids"] == IMAGE).sum(1) // 9
    return inputs | {"pixel_attention_mask": torch.arange(inputs["pixel_values"].shape[1]) < counts[:, None]}
