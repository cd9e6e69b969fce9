"""Qwen2-VL: a packed ViT whose patches are merged 2 x 2, and multimodal RoPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dropflow import Backbone, ImageLayout


class Qwen2VL(Backbone):
    """`Qwen2VLForConditionalGeneration`; images vary in size, and every frame pair of a video is an image."""

    modalities = ("image", "video")
    gridded = True

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:
        """One image per time step, from the grid (time, height, width) of patches after the merger."""
        patches = arguments.get(f"{modality}_grid_thw")
        if patches is None:
            return super().layouts(modality, sizes, arguments)
        merge = self.model.config.vision_config.spatial_merge_size
        grids = [(t, h // merge, w // merge) for t, h, w in patches.tolist()]
        return [[ImageLayout(h * w, (h, w))] * t for t, h, w in grids]
