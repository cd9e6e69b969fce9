"""LLaVA-NeXT: an overview of the image, then its tiles, joined, unpadded, and with a newline after every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dropflow import Backbone, ImageLayout


class LlavaNext(Backbone):
    """`LlavaNextForConditionalGeneration`; the overview and the joined tiles are separate images."""

    gridded = True

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        vision = self.model.config.vision_config
        return int(vision.image_size // vision.patch_size)

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:
        """Overview and joined tiles of each image; an image of one tile is an overview with one newline."""
        if arguments.get("image_sizes") is None:
            return super().layouts(modality, sizes, arguments)
        overview, square = self.side**2, (self.side, self.side)
        found = []
        for size, height_width in zip(sizes, arguments["image_sizes"], strict=True):
            if size == overview + 1:
                found.append([ImageLayout(size, square, tail=1)])
            else:
                joined = ImageLayout(size - overview, self.joined(height_width), line_ends=True)
                found.append([ImageLayout(overview, square), joined])
        return found

    def joined(self, height_width: Any) -> tuple[int, int]:
        """Grid of the joined tiles of an image of this size in pixels, computed by the model's own unpadding."""
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

        config = self.model.config
        down, across = get_anyres_image_grid_shape(
            height_width, config.image_grid_pinpoints, config.vision_config.image_size
        )
        canvas = torch.empty(1, down * self.side, across * self.side, device="meta")
        _, rows, columns = unpad_image(canvas, height_width).shape
        return rows, columns
