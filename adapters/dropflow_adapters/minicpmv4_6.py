"""MiniCPM-V 4.6: a packed tower that merges 4 x 4 patches in two steps, and Qwen3.5's text decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dropflow import Backbone, ImageLayout


class MiniCPMV46(Backbone):
    """`MiniCPMV4_6ForConditionalGeneration`; every entry is a picture, a slice or a frame, and images vary in size."""

    modalities = ("image", "video")
    gridded = True

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:
        """One image per entry; its number of patches in either direction determines its grid."""
        shapes = arguments.get("target_sizes_videos" if modality == "video" else "target_sizes")
        shapes = arguments.get("target_sizes") if shapes is None else shapes
        if shapes is None:
            return super().layouts(modality, sizes, arguments)
        config = self.model.config
        mode = arguments.get("downsample_mode") or config.downsample_mode
        merge = config.merge_kernel_size[0] ** config.merger_times * (1 if mode == "4x" else 2)
        return [
            [ImageLayout(size, (height // merge, width // merge))]
            for size, (height, width) in zip(sizes, shapes.tolist(), strict=True)
        ]
