"""Qwen2.5-VL in miniature."""

from __future__ import annotations

from typing import Any

from dropflow.testing.families.qwen2_vl import packed_image, packed_video, tokens_and_text, with_token_types
from dropflow.testing.families.tiny import Tiny


def tiny() -> Tiny:
    """A Qwen2.5-VL with images of 2 x 4 and 4 x 3 tokens and videos of two frame pairs."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "out_hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }

    def build() -> Any:
        config = Qwen2_5_VLConfig(**tokens_and_text([2, 1, 1]), vision_config=vision)
        return Qwen2_5_VLForConditionalGeneration(config)

    return Tiny(build, {"image": packed_image, "video": packed_video}, with_token_types)
