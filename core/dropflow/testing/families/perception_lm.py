"""Perception LM in miniature, with a CLIP tower in place of timm's, which is an optional library."""

from __future__ import annotations

from typing import Any

import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families.tiny import IMAGE, TEXT, VIDEO, VISION, Picture, Tiny, pixels


def tiny() -> Tiny:
    """A Perception LM that pools 4 x 4 patches into 2 x 2 tokens per tile or frame."""
    from transformers import PerceptionLMConfig, PerceptionLMForConditionalGeneration

    tower = {**VISION, "image_size": 24, "patch_size": 6, "model_type": "clip_vision_model"}

    def build() -> Any:
        config = PerceptionLMConfig(
            text_config={**TEXT, "model_type": "llama"},
            vision_config=tower | {"model_args": {"embed_dim": VISION["hidden_size"]}},
            projector_pooling_ratio=2,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        )
        return PerceptionLMForConditionalGeneration(config)

    def tiles(_: int, dice: torch.Generator) -> Picture:
        return Picture([IMAGE] * 8, {"pixel_values": pixels(dice, 1, 2, 3, 24, 24)}, [ImageLayout(4, (2, 2))] * 2)

    def video(_: int, dice: torch.Generator) -> Picture:
        frames = [ImageLayout(4, (2, 2))] * 3
        return Picture([VIDEO] * 12, {"pixel_values_videos": pixels(dice, 1, 3, 3, 24, 24)}, frames)

    return Tiny(build, {"image": tiles, "video": video})
