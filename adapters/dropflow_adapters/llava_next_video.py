"""LLaVA-NeXT-Video: LLaVA-NeXT for images, and pooled frames one after the other for videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dropflow import ImageLayout, patch_blocks
from dropflow_adapters.anyres import frame_members
from dropflow_adapters.llava_next import LlavaNext


class LlavaNextVideo(LlavaNext):
    """`LlavaNextVideoForConditionalGeneration`; every frame is a separate image."""

    features_form = None  # videos have another form than images
    modalities = ("image", "video")

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:
        """One image per frame of a video, without newlines; still images as in LLaVA-NeXT."""
        if modality == "image":
            return super().layouts(modality, sizes, arguments)
        pooled = self.side // self.model.config.spatial_pool_stride
        return [[ImageLayout(pooled**2, (pooled, pooled))] * (size // pooled**2) for size in sizes]

    def members(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[Tensor]:
        """Of a frame, every square of neighbours is pooled into a token."""
        if modality == "image":
            return super().members(modality, sizes, arguments)
        config = self.model.config
        return frame_members(
            patch_blocks((self.side, self.side), config.spatial_pool_stride), config, sizes, self.prefix
        )
