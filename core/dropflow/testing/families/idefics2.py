"""Idefics2 in miniature."""

from __future__ import annotations

from typing import Any

import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families.tiny import IMAGE, START, TEXT, VISION, Picture, Tiny, pixels

LATENTS = 6
"""Tokens of a tile."""


def tiny() -> Tiny:
    """An Idefics2 whose second image has two tiles."""
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration

    resampler = {"hidden_size": 32, "resampler_n_latents": LATENTS, "resampler_depth": 1, "resampler_n_heads": 2}

    def build() -> Any:
        config = Idefics2Config(
            text_config={**TEXT, "model_type": "mistral", "sliding_window": None, "head_dim": 8},
            vision_config={**VISION, "image_size": 24, "patch_size": 6},
            perceiver_config=resampler | {"resampler_head_dim": 8, "num_key_value_heads": 2},
            image_token_id=IMAGE,
        )
        return Idefics2ForConditionalGeneration(config)

    return Tiny(build, {"image": tiles}, by_sample)


def tiles(number: int, dice: torch.Generator) -> Picture:
    """An image of one or two tiles."""
    count = 1 + number % 2
    arguments = {"pixel_values": pixels(dice, count, 3, 24, 24)}
    return Picture([START, *[IMAGE] * LATENTS] * count, arguments, [ImageLayout(LATENTS)] * count)


def by_sample(inputs: dict[str, Any]) -> dict[str, Any]:
    """Tiles by sample (batch, most tiles, 3, height, width), padded with zeros as by the processor."""
    if "pixel_values" not in inputs:
        return inputs
    parts = inputs["pixel_values"].split(((inputs["input_ids"] == IMAGE).sum(1) // LATENTS).tolist())
    return inputs | {"pixel_values": torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)}
