"""InternVL: equal tiles, in which a pixel shuffle joins four neighbouring patches into one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dropflow import Backbone, VisionReader, feature_boundary, patch_blocks, square_grid


class InternVL(Backbone):
    """`InternVLForConditionalGeneration`; every tile or video frame is a separate image, and the caller says which."""

    features_form = "tensor"
    unstated_videos = frozenset({"image"})

    @property
    def tokens_per_image(self) -> int:
        """Number of tokens in a tile."""
        rows, columns = self._patches
        return int(rows * columns * self.model.config.downsample_ratio**2)

    def reader(self, modality: str = "image") -> VisionReader:  # noqa: ARG002
        """The tower: a CLS row and the patches of each tile, of which every square of neighbours becomes a token."""
        config, encoder = self.model.config, self.core.vision_tower.encoder
        (rows, columns), side = self._patches, round(1 / config.downsample_ratio)

        def members(sizes: Sequence[int], _: Mapping[str, Any]) -> list[Tensor]:
            tile = patch_blocks((rows, columns), side) + 1
            return [tile + number * (rows * columns + 1) for number in range(len(sizes))]

        last = feature_boundary(config.vision_feature_layer, len(encoder.layer))
        return VisionReader(encoder, members, layers="layer", prefix=1, has_cls=True, feature_layer=last)

    @property
    def _patches(self) -> tuple[int, int]:
        """Rows and columns of patches of a tile."""
        vision = self.model.config.vision_config
        (height, width), (down, across) = vision.image_size, vision.patch_size
        return height // down, width // across

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of patches after the pixel shuffle."""
        return square_grid(tokens)
