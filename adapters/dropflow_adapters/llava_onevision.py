"""LLaVA-OneVision: LLaVA-NeXT's tiles, downscaled where there are too many, and pooled frames for videos."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dropflow import ImageLayout
from dropflow_adapters.llava_next import LlavaNext


class LlavaOnevision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration`; a video's single final newline counts with its last frame."""

    modalities = ("image", "video")

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:
        """The overview and the joined tiles of an image; the frames of a video."""
        if modality == "image":
            return super().layouts(modality, sizes, arguments)
        side = math.ceil(self.side / 2)
        frame, last = ImageLayout(side**2, (side, side)), ImageLayout(side**2 + 1, (side, side), tail=1)
        return [[*[frame] * (size // side**2 - 1), last] for size in sizes]

    def joined(self, height_width: Any) -> tuple[int, int]:
        """Grid of the joined tiles, downscaled as by the model where they exceed `anyres_max_<tiles>`."""
        rows, columns = super().joined(height_width)
        most = int(self.model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * self.side**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
