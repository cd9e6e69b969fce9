"""Video-LLaVA in miniature."""

from __future__ import annotations

from typing import Any

import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families.tiny import IMAGE, TEXT, VIDEO, VISION, Picture, Tiny, pixels, square_pictures


def tiny() -> Tiny:
    """A Video-LLaVA with images of 4 x 4 patches and videos of two frames."""
    from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

    def build() -> Any:
        config = VideoLlavaConfig(
            text_config={**TEXT, "model_type": "llama"},
            vision_config={**VISION, "image_size": 24, "patch_size": 6, "model_type": "clip_vision_model"},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        )
        return VideoLlavaForConditionalGeneration(config)

    def video(_: int, dice: torch.Generator) -> Picture:
        frame = ImageLayout(17, (4, 4), head=1)
        return Picture([VIDEO] * 34, {"pixel_values_videos": pixels(dice, 1, 2, 3, 24, 24)}, [frame] * 2)

    return Tiny(build, {"image": square_pictures(24, 16), "video": video})
