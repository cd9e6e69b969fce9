"""Idefics2: a resampler turns every tile into a fixed number of tokens, each of which reads the whole tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dropflow import Backbone, ImageLayout, Projections


class Idefics2(Backbone):
    """`Idefics2ForConditionalGeneration`; every tile is a separate image, whose tokens have no places in a grid."""

    @property
    def tokens_per_image(self) -> int:
        """Number of tokens in a tile."""
        return int(self.model.config.perceiver_config.resampler_n_latents)

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:  # noqa: ARG002
        """One image per tile; each entry holds all tiles of a sample."""
        tile = self.tokens_per_image
        return [[ImageLayout(tile)] * (size // tile) for size in sizes]

    def projections(self, layer: Any) -> Projections:
        """Mistral's."""
        return Projections.of(layer.self_attn)
