"""LLaVA-NeXT-Video: LLaVA-NeXT for images, and pooled frames one after the other for videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.tiny import VIDEO, Picture, Tiny, pixels
from dropflow_adapters.llava_next import LlavaNext, anyres_image, small


class LlavaNextVideo(LlavaNext):
    """`LlavaNextVideoForConditionalGeneration`; every frame is an image of its own."""

    modalities = ("image", "video")

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:
        """Frames have no newlines."""
        if modality == "image":
            return super().layouts(modality, sizes, arguments)
        pooled = self.side // self.model.config.spatial_pool_stride
        return [[ImageLayout(pooled**2, (pooled, pooled))] * (size // pooled**2) for size in sizes]

    @classmethod
    def tiny(cls) -> Tiny:
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
