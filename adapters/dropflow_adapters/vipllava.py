"""ViP-LLaVA: LLaVA-1.5 whose patches are the concatenated features of several layers of a CLIP tower."""

from __future__ import annotations

from typing import Any

from dropflow import Backbone, Projections, VisionReader, feature_boundary, one_to_one, square_grid


class VipLlava(Backbone):
    """`VipLlavaForConditionalGeneration`; a row dropped inside the tower would be lost in parts, so none can be."""

    features_form = "tensor"

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

    def reader(self, modality: str = "image") -> VisionReader:  # noqa: ARG002
        """The tower: a CLS row and the patches of each picture, which become tokens one by one."""
        encoder = self.core.vision_tower.encoder
        last = feature_boundary(self.model.config.vision_feature_layers, len(encoder.layers))
        return VisionReader(
            encoder, lambda sizes, _: one_to_one(sizes, prefix=1), prefix=1, has_cls=True, feature_layer=last
        )
