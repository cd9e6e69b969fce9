"""Molmo 2: an overview and a grid of crops, whose patches an attention pools into tokens added to the placeholders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dropflow import Backbone, ImageLayout, VisionReader, feature_boundary


class Molmo2(Backbone):
    """`Molmo2ForConditionalGeneration`; overview and joined crops are separate images, and so is every video frame."""

    modalities = ("image", "video")
    gridded = True
    bidirectional = "images"

    @property
    def visual_ids(self) -> dict[str, int]:
        """One placeholder for both modalities, of which a call can bring only one."""
        return dict.fromkeys(self.modalities, int(self.model.config.image_token_id))

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:
        """From the grids (overview rows and columns, rows and columns) of pictures, or (frames, rows, columns)."""
        grids = arguments.get(f"{modality}_grids")
        if grids is None:
            return super().layouts(modality, sizes, arguments)
        if modality == "video":
            return [[ImageLayout(h * w, (h, w))] * frames for frames, h, w in grids.tolist()]
        return [
            [ImageLayout(h * w, (h, w)) for h, w in (grid[:2], grid[2:]) if h * w]  # a picture may be an overview only
            for grid in grids.tolist()
        ]

    def reader(self, modality: str = "image") -> VisionReader:
        """The tower: the patches of every crop or frame, of which the call says which are pooled into a token."""
        tower = self.core.vision_tower
        features = self.model.config.adapter_config.vision_feature_layer
        entries = [layer + 1 if layer >= 0 else layer for layer in features]  # a layer's own output, or a hidden state

        def members(sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[Tensor]:
            table = arguments[f"{modality}_token_pooling"]
            return list((table[(table >= 0).any(-1)]).split(list(sizes)))

        return VisionReader(tower, members, feature_layer=feature_boundary(entries, len(tower.layers)))
