"""Idefics3 and SmolVLM: tiles of one size, each announced by its place, neighbours shuffled into one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dropflow import Backbone
from dropflow.backbone.backbone import square
from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.tiny import IMAGE, START, TEXT, VISION, Picture, Tiny, pixels


class Idefics3(Backbone):
    """`Idefics3ForConditionalGeneration` and `SmolVLMForConditionalGeneration`; every tile is an image of its own."""

    @property
    def tokens_per_image(self) -> int:
        """Tokens of one tile."""
        config, vision = self.model.config, self.model.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2 / config.scale_factor**2)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of shuffled patches."""
        return square(tokens)

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:  # noqa: ARG002
        """An entry holds all tiles of a sample."""
        tile = self.tokens_per_image
        return [[ImageLayout(tile, self.grid(tile))] * (size // tile) for size in sizes]

    @classmethod
    def tiny(cls) -> Tiny:
        """An Idefics3 whose second image has two tiles."""
        from transformers import Idefics3Config, Idefics3ForConditionalGeneration

        def build() -> Any:
            return Idefics3ForConditionalGeneration(Idefics3Config(**small()))

        return Tiny(build, {"image": tiles}, by_sample)


class SmolVLM(Idefics3):
    """`SmolVLMForConditionalGeneration`; frames of a video are images, too."""

    @classmethod
    def tiny(cls) -> Tiny:
        """A SmolVLM whose second image has two tiles."""
        from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

        def build() -> Any:
            return SmolVLMForConditionalGeneration(SmolVLMConfig(**small()))

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
    """Tiles by sample (batch, most tiles, 3, height, width), filled up with zeros as the processor does."""
    if "pixel_values" not in inputs:
        return inputs
    counts = ((inputs["input_ids"] == IMAGE).sum(1) // 9).tolist()
    parts = inputs["pixel_values"].split(counts)
    return inputs | {"pixel_values": torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)}
