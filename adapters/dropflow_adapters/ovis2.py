"""Ovis 2: each patch, or block of patches, becomes a mixture of visual words, looked up in a table of embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dropflow import Backbone, Projections, Sublayers, VisionEncoder, VisionReader, patch_blocks, square_grid


class Ovis2(Backbone):
    """`Ovis2ForConditionalGeneration`; every tile is an image, and the tokens that enclose tiles are text."""

    @property
    def vision(self) -> VisionEncoder | None:
        """The tower's encoder; `None` where blocks of patches are joined."""
        if self._stride > 1:
            return None
        encoder = self.core.vision_tower.transformer.encoder
        return VisionEncoder(
            encoder,
            prefix=0,
            has_cls=False,
            feature_layer=len(encoder.layers),
            select_prefix=0,
            sublayers=lambda layer: Sublayers(layer.attention, layer.ffn),
        )

    def reader(self, modality: str = "image") -> VisionReader | None:
        """The tower, also where blocks of patches are joined."""
        if self._stride == 1:
            return super().reader(modality)

        def members(sizes: Sequence[int], _: Mapping[str, Any]) -> list[Tensor]:
            tile = patch_blocks((self._side, self._side), self._stride)
            return [tile + number * self._side**2 for number in range(len(sizes))]

        return VisionReader(self.core.vision_tower.transformer.encoder, members)

    def projections(self, layer: Any) -> Projections:
        """Projections of a decoder layer, which have the same names in Qwen2 and Llama."""
        return Projections.of(layer.self_attn)

    @property
    def enclosing(self) -> Sequence[int]:
        """The indicators of tiles and images, which the visual table embeds."""
        return tuple(self.model.config.visual_indicator_token_ids)

    @property
    def tokens_per_image(self) -> int:
        """Number of tokens in a tile."""
        return (self._side // self._stride) ** 2

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of patches or blocks."""
        return square_grid(tokens)

    @property
    def _stride(self) -> int:
        """Patches along one side of a block."""
        return int(self.model.config.vision_config.hidden_stride)

    @property
    def _side(self) -> int:
        """Patches along one side of a tile."""
        tower = self.model.config.vision_config
        return int(tower.image_size // tower.patch_size)
