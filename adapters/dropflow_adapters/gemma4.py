"""Gemma 4: images of any size, pooled over k x k patches; in the small models the last layers share keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from dropflow import Backbone, ImageLayout


class Gemma4(Backbone):
    """`Gemma4ForConditionalGeneration` and `Gemma4UnifiedForConditionalGeneration`; every frame is an image.

    Audio tokens count as text.
    """

    modalities = ("image", "video")
    gridded = True
    bidirectional = "images"

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:
        """One image per picture or frame; the largest x and y of its patches determine its grid."""
        places = arguments.get(f"{modality}_position_ids")
        if places is None:
            return super().layouts(modality, sizes, arguments)
        pool = self._pool
        grids = [(int(y) // pool, int(x) // pool) for x, y in (places.amax(1) + 1).tolist()]
        images = [ImageLayout(height * width, (height, width)) for height, width in grids]
        frames = arguments.get("num_frames_per_video") if modality == "video" else None
        counts = [1] * len(images) if frames is None else frames.tolist()
        return [images[start:end] for start, end in pairwise(accumulate(counts, initial=0))]

    @property
    def _pool(self) -> int:
        """Patches that become one token, in either direction; the unified model receives them merged already."""
        config = self.model.config.vision_config
        return 1 if hasattr(config, "model_patch_size") else int(config.pooling_kernel_size)
