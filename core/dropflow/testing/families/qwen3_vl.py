"""Qwen3-VL in miniature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families.qwen2_vl import packed, packed_image, tokens_and_text, with_token_types
from dropflow.testing.families.tiny import END, START, VIDEO, Picture, Tiny

VISION: Mapping[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "deepstack_visual_indexes": [0, 1],
    "num_position_embeddings": 64,
}
"""Options of a tiny vision encoder."""


def tiny() -> Tiny:
    """A Qwen3-VL with two deepstack layers."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    def build() -> Any:
        config = Qwen3VLConfig(**tokens_and_text([2, 1, 1], head_dim=8), vision_config=dict(VISION))
        return Qwen3VLForConditionalGeneration(config)

    return Tiny(build, {"image": packed_image, "video": stamped_video}, with_token_types)


def stamped_video(_: int, dice: torch.Generator) -> Picture:
    """A video of two times 2 x 3 tokens, each after a text token."""
    frame = [5, START, *[VIDEO] * 6, END]
    return Picture(frame * 2, packed("video", 2, 4, 6, dice), [ImageLayout(6, (2, 3))] * 2)
