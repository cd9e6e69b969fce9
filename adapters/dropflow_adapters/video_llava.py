"""Video-LLaVA: two towers of one kind, one for images and one for the frames of videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dropflow import Backbone, ImageLayout, square_grid


class VideoLlava(Backbone):
    """`VideoLlavaForConditionalGeneration`; every frame is an image, and its CLS row, never scored, goes with it."""

    modalities = ("image", "video")
    gridded = True

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of patches."""
        return square_grid(tokens)

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:  # noqa: ARG002
        """Frames keep the CLS row that `default` cuts from images."""
        full = modality == "video" or self.model.config.vision_feature_select_strategy == "full"
        return [[ImageLayout(size, square_grid(size - full), head=int(full))] for size in sizes]
