"""LLaVA-NeXT in miniature."""

from __future__ import annotations

from typing import Any

import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families.tiny import IMAGE, TEXT, VISION, Picture, Tiny, pixels


def tiny() -> Tiny:
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
    """An image on two tiles, stacked or side by side, half of whose canvas is padding that is removed."""
    height, width = ((48, 12), (12, 48))[number % 2]
    rows, columns = height // 6, width // 6
    layouts = [ImageLayout(16, (4, 4)), ImageLayout(rows * (columns + 1), (rows, columns), line_ends=True)]
    arguments = {"pixel_values": pixels(dice, 3, 3, 24, 24), "image_sizes": torch.tensor([[height, width]])}
    return Picture([IMAGE] * sum(layout.tokens for layout in layouts), arguments, layouts)
