"""Mistral 3: a Pixtral tower whose patches are merged 2 x 2; images keep their aspect ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dropflow import Backbone, ImageLayout, VisionReader
from dropflow_adapters.pixtral_tower import pixtral_reader


class Mistral3(Backbone):
    """`Mistral3ForConditionalGeneration`; the row breaks between placeholders are text tokens, so they always stay."""

    features_form = "list"
    gridded = True

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:
        """One image per entry; its size in pixels determines its grid."""
        if arguments.get("image_sizes") is None:
            return super().layouts(modality, sizes, arguments)
        config = self.model.config
        side = config.vision_config.patch_size * config.spatial_merge_size
        grids = [(int(h) // side, int(w) // side) for h, w in arguments["image_sizes"]]
        return [[ImageLayout(h * w, (h, w))] for h, w in grids]

    def reader(self, modality: str = "image") -> VisionReader:  # noqa: ARG002
        """The packed tower."""
        config = self.model.config
        return pixtral_reader(self.core.vision_tower, config.vision_feature_layer, config.spatial_merge_size)
