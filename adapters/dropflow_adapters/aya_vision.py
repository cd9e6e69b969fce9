"""Aya Vision: equal tiles, in which a pixel shuffle joins neighbouring SigLIP patches into one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dropflow import Backbone, VisionReader, feature_boundary, patch_blocks, square_grid


class AyaVision(Backbone):
    """`AyaVisionForConditionalGeneration`; every tile is a separate image."""

    features_form = "tensor"

    @property
    def tokens_per_image(self) -> int:
        """Number of tokens in a tile."""
        return int((self._side // self.model.config.downsample_factor) ** 2)

    def reader(self, modality: str = "image") -> VisionReader:  # noqa: ARG002
        """The tower: the patches of each tile, of which every square of neighbours becomes a token."""
        config, encoder = self.model.config, self.core.vision_tower.encoder

        def members(sizes: Sequence[int], _: Mapping[str, Any]) -> list[Tensor]:
            tile = patch_blocks((self._side, self._side), config.downsample_factor)
            return [tile + number * self._side**2 for number in range(len(sizes))]

        last = feature_boundary(config.vision_feature_layer, len(encoder.layers))
        return VisionReader(encoder, members, feature_layer=last)

    @property
    def _side(self) -> int:
        """Patches along one side of a tile."""
        tower = self.model.config.vision_config
        return int(tower.image_size // tower.patch_size)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of patches after the pixel shuffle."""
        return square_grid(tokens)
