"""Video-LLaVA: two towers of one kind, one for images and one for the frames of videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dropflow import Backbone
from dropflow.backbone.backbone import square
from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.tiny import IMAGE, TEXT, VIDEO, VISION, Picture, Tiny, pixels, square_pictures


class VideoLlava(Backbone):
    """`VideoLlavaForConditionalGeneration`; every frame is an image, and its CLS row, never scored, goes with it."""

    modalities = ("image", "video")
    gridded = True

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of patches."""
        return square(tokens)

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:  # noqa: ARG002
        """Frames keep the CLS row that `default` cuts from images."""
        full = modality == "video" or self.model.config.vision_feature_select_strategy == "full"
        return [[ImageLayout(size, square(size - full), head=int(full))] for size in sizes]

    @classmethod
    def tiny(cls) -> Tiny:
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
