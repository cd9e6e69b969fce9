"""Gemma 3: a SigLIP tower pooled to a fixed number of tokens, which attend to each other bidirectionally."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dropflow import Backbone, VisionReader, patch_blocks, square_grid


class Gemma3(Backbone):
    """`Gemma3ForConditionalGeneration`; every image, or pan-and-scan crop, has the same number of tokens."""

    features_form = "tensor"
    bidirectional = "images"

    @property
    def tokens_per_image(self) -> int:
        """Tokens after pooling."""
        return int(self.model.config.mm_tokens_per_image)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of pooled patches."""
        return square_grid(tokens)

    def reader(self, modality: str = "image") -> VisionReader:  # noqa: ARG002
        """The tower: the patches of each picture, of which every square of neighbours is pooled."""
        vision, tokens = self.model.config.vision_config, int(self.tokens_per_image**0.5)
        side = int(vision.image_size // vision.patch_size)

        def members(sizes: Sequence[int], _: Mapping[str, Any]) -> list[Tensor]:
            return [patch_blocks((side, side), side // tokens) + number * side**2 for number in range(len(sizes))]

        return VisionReader(self.core.vision_tower.encoder, members)
