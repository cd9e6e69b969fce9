"""Video-LLaVA: two towers of the same kind, one for images and one for video frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dropflow import Backbone, ImageLayout, square_grid


class VideoLlava(Backbone):
    """`VideoLlavaForConditionalGeneration`; every frame is an image; its CLS row is kept with it, unscored."""

    modalities = ("image", "video")
    gridded = True

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of patches."""
        return square_grid(tokens)

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:  # noqa: ARG002
        """One image per entry or frame; frames keep the CLS row, which the `default` strategy removes from images."""
        full = modality == "video" or self.model.config.vision_feature_select_strategy == "full"
        return [[ImageLayout(size, square_grid(size - full), head=int(full))] for size in sizes]
