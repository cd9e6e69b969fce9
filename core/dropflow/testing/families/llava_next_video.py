"""LLaVA-NeXT-Video in miniature."""

from __future__ import annotations

from typing import Any

import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families.llava_next import anyres_image, small
from dropflow.testing.families.tiny import VIDEO, Picture, Tiny, pixels


def tiny() -> Tiny:
    """A LLaVA-NeXT-Video with frames of 2 x 2 tokens."""
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    def build() -> Any:
        options = small("clip_vision_model", "default") | {"video_token_id": VIDEO}
        config = LlavaNextVideoConfig(**options, spatial_pool_mode="average", spatial_pool_stride=2)
        return LlavaNextVideoForConditionalGeneration(config)

    def video(_: int, dice: torch.Generator) -> Picture:
        return Picture(
            [VIDEO] * 12, {"pixel_values_videos": pixels(dice, 1, 3, 3, 24, 24)}, [ImageLayout(4, (2, 2))] * 3
        )

    return Tiny(build, {"image": anyres_image, "video": video})
