"""LLaVA-OneVision in miniature."""

from __future__ import annotations

from typing import Any

import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families.llava_next import anyres_image, small
from dropflow.testing.families.tiny import VIDEO, Picture, Tiny, pixels


def tiny() -> Tiny:
    """A LLaVA-OneVision with tiles of 4 x 4 patches and frames of 2 x 2 tokens."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    def build() -> Any:
        config = LlavaOnevisionConfig(**small("siglip_vision_model", "full"), video_token_id=VIDEO)
        return LlavaOnevisionForConditionalGeneration(config)

    def video(_: int, dice: torch.Generator) -> Picture:
        layouts = [ImageLayout(4, (2, 2)), ImageLayout(4, (2, 2)), ImageLayout(5, (2, 2), tail=1, closes=True)]
        return Picture([VIDEO] * 13, {"pixel_values_videos": pixels(dice, 1, 3, 3, 24, 24)}, layouts)

    return Tiny(build, {"image": anyres_image, "video": video})
