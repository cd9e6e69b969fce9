"""LLaVA-NeXT: an overview of the image, then its tiles joined, un-padded, and ended row by row with a newline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dropflow import Backbone
from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.tiny import IMAGE, TEXT, VISION, Picture, Tiny, pixels


class LlavaNext(Backbone):
    """`LlavaNextForConditionalGeneration`; overview and joined tiles are an image each, with a grid of its own."""

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
        """Grid of the joined tiles of an image of that size in pixels, by the model's own un-padding."""
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

        config = self.model.config
        down, across = get_anyres_image_grid_shape(
            height_width, config.image_grid_pinpoints, config.vision_config.image_size
        )
        canvas = torch.empty(1, down * self.side, across * self.side, device="meta")
        _, rows, columns = unpad_image(canvas, height_width).shape
        return rows, columns

    @classmethod
    def tiny(cls) -> Tiny:
        """A LLaVA-NeXT with tiles of 4 x 4 patches."""
        from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

        def build() -> Any:
            return LlavaNextForConditionalGeneration(LlavaNextConfig(**small("clip_vision_model", "default")))

        return Tiny(build, {"image": anyres_image})


def small(tower: str, strategy: str) -> dict[str, Any]:
    """Options of a tiny config: tiles of 24 x 24 pixels, 4 x 4 patches."""
    vision = {**VISION, "image_size": 24, "patch_size": 6, "model_type": tower}
    return {
        "text_config": {**TEXT, "model_type": "llama" if strategy == "default" else "qwen2"},
        "vision_config": vision | ({} if strategy == "default" else {"vision_use_head": False}),
        "image_token_id": IMAGE,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": strategy,
        "image_grid_pinpoints": [[24, 48], [48, 24], [48, 48]],
    }


def anyres_image(number: int, dice: torch.Generator) -> Picture:
    """An image on two tiles below or beside each other, half of whose canvas is padding that goes."""
    height, width = ((48, 12), (12, 48))[number % 2]
    rows, columns = height // 6, width // 6
    layouts = [ImageLayout(16, (4, 4)), ImageLayout(rows * (columns + 1), (rows, columns), line_ends=True)]
    arguments = {"pixel_values": pixels(dice, 3, 3, 24, 24), "image_sizes": torch.tensor([[height, width]])}
    return Picture([IMAGE] * sum(layout.tokens for layout in layouts), arguments, layouts)
