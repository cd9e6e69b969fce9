"""Molmo 2: an overview and a grid of crops, whose patches an attention pools into tokens added to the placeholders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dropflow import Backbone, ImageLayout


class Molmo2(Backbone):
    """`Molmo2ForConditionalGeneration`; overview and joined crops are separate images, and so is every video frame."""

    modalities = ("image", "video")
    gridded = True

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
