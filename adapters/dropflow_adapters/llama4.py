"""Llama 4: tiles of one size whose patches are pixel-shuffled, and chunked attention between layers without RoPE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dropflow import Backbone, DecoderWidths, Projections, square_grid


class Llama4(Backbone):
    """`Llama4ForConditionalGeneration`; every tile is an image, and so is the overview of a picture."""

    @property
    def core(self) -> Any:
        """The model itself, which has no core apart from its head."""
        return self.model

    @property
    def text(self) -> Any:
        """The text decoder inside the causal language model."""
        return self.model.language_model.model

    def projections(self, layer: Any) -> Projections:
        """Projections of a decoder layer."""
        return Projections.of(layer.self_attn)

    @property
    def tokens_per_image(self) -> int:
        """Tokens of a tile after the pixel shuffle."""
        vision = self.model.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2 * vision.pixel_shuffle_ratio**2)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of a tile."""
        return square_grid(tokens)

    @property
    def feature_width(self) -> int:
        """Width before the projector, which the core applies to what `get_image_features` returns."""
        return int(self.model.config.vision_config.vision_output_dim)

    @property
    def decoder_widths(self) -> DecoderWidths:
        """Widths of the text decoder, with the mean width of what a token passes through in dense and expert layers."""
        config = self.text.config
        experts = (1 + config.num_experts_per_tok) * config.intermediate_size * len(config.moe_layers)
        dense = config.intermediate_size_mlp * (config.num_hidden_layers - len(config.moe_layers))
        return replace(DecoderWidths.of(config), intermediate=(experts + dense) // config.num_hidden_layers)
