"""Video-LLaVA: two towers of the same kind, one for images and one for video frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dropflow import Backbone, ImageLayout, VisionReader, feature_boundary, one_to_one, square_grid


class VideoLlava(Backbone):
    """`VideoLlavaForConditionalGeneration`; every frame is an image; its CLS row is kept with it, unscored."""

    modalities = ("image", "video")
    gridded = True

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of patches."""
        return square_grid(tokens)

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:  # noqa: ARG002
        """One image per entry or frame; frames keep the CLS row, which the `default` strategy removes from images."""
        full = self._keeps_cls(modality)
        return [[ImageLayout(size, square_grid(size - full), head=int(full))] for size in sizes]

    def video_lengths(self, entries: Sequence[int], arguments: Mapping[str, Any]) -> Sequence[int] | None:  # noqa: ARG002
        """From the pixels (videos, frames, channels, height, width); every frame is an entry of the features."""
        pixels = arguments.get("pixel_values_videos")
        return None if pixels is None else [pixels.shape[1]] * pixels.shape[0]

    def reader(self, modality: str = "image") -> VisionReader:
        """The tower of the modality: a CLS row and the patches of each image or frame."""
        kept, selected = int(self._keeps_cls(modality)), self.model.config.vision_feature_layer
        encoder = (self.core.video_tower if modality == "video" else self.core.image_tower).encoder
        return VisionReader(
            encoder,
            lambda sizes, _: one_to_one(sizes, 1, kept),
            prefix=1,
            has_cls=True,
            feature_layer=feature_boundary(selected, len(encoder.layers)),
        )

    def _keeps_cls(self, modality: str) -> bool:
        return modality == "video" or self.model.config.vision_feature_select_strategy == "full"
