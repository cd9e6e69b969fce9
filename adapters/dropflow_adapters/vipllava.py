"""ViP-LLaVA: LLaVA-1.5 whose patches are the concatenated features of several layers of a CLIP tower."""

from __future__ import annotations

from typing import Any

from dropflow import Backbone, Projections, square_grid


class VipLlava(Backbone):
    """`VipLlavaForConditionalGeneration`; a row dropped inside the tower would be lost in parts, so none can be."""

    @property
    def tokens_per_image(self) -> int:
        """One token per patch; the CLS token of every layer is removed."""
        tower = self.model.config.vision_config
        return int((tower.image_size // tower.patch_size) ** 2)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of patches."""
        return square_grid(tokens)

    def projections(self, layer: Any) -> Projections:
        """Llama's."""
        return Projections.of(layer.self_attn)
