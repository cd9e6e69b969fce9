"""Ovis 2 in miniature."""

from __future__ import annotations

from typing import Any

import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families.tiny import IMAGE, TEXT, VISION, Picture, Tiny, pixels

INDICATORS = (80, 81, 82, 83, 84)
"""Tokens that enclose and divide tiles, with embeddings from the visual table."""


def tiny() -> Tiny:
    """An Ovis 2 with 4 x 4 patches per tile and a table of 20 visual words."""
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration

    vision: dict[str, Any] = {**VISION, "image_size": 24, "patch_size": 6, "vocab_size": 25}

    def build() -> Any:
        config = Ovis2Config(
            text_config={**TEXT, "model_type": "qwen2"},
            vision_config=vision,
            image_token_id=IMAGE,
            visual_indicator_token_ids=list(INDICATORS),
            vocab_size=TEXT["vocab_size"],
            hidden_size=TEXT["hidden_size"],
        )
        return Ovis2ForConditionalGeneration(config)

    def picture(_: int, dice: torch.Generator) -> Picture:
        ids = [INDICATORS[0], *[IMAGE] * 16, INDICATORS[1]]
        return Picture(ids, {"pixel_values": pixels(dice, 1, 3, 24, 24)}, [ImageLayout(16, (4, 4))])

    return Tiny(build, {"image": picture}, silent=(IMAGE, *INDICATORS))
