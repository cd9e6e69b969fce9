"""Idefics3 in miniature."""

from __future__ import annotations

from typing import Any

import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families.tiny import IMAGE, START, TEXT, VISION, Picture, Tiny, pixels


def tiny() -> Tiny:
    """An Idefics3 whose second image has two tiles."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    def build() -> Any:
        return Idefics3ForConditionalGeneration(Idefics3Config(**small()))

    return Tiny(build, {"image": tiles}, by_sample)


def small() -> dict[str, Any]:
    """Options of a tiny config."""
    return {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "image_size": 36, "patch_size": 6},
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "pad_token_id": 0,
    }


def tiles(number: int, dice: torch.Generator) -> Picture:
    """An image of one or two tiles of 3 x 3 tokens."""
    count = 1 + number % 2
    return Picture(
        [START, *[IMAGE] * 9] * count,
        {"pixel_values": pixels(dice, count, 3, 36, 36)},
        [ImageLayout(9, (3, 3))] * count,
    )


def by_sample(inputs: dict[str, Any]) -> dict[str, Any]:
    """Tiles by sample (batch, most tiles, 3, height, width), padded with zeros as by the processor."""
    if "pixel_values" not in inputs:
        return inputs
    counts = ((inputs["input_ids"] == IMAGE).sum(1) // 9).tolist()
    parts = inputs["pixel_values"].split(counts)
    return inputs | {"pixel_values": torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)}
