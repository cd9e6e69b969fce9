"""LFM2-VL: a SigLIP 2 tower on padded patches, merged 2 x 2, and short convolutions between attention layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dropflow import Backbone, DecoderWidths, ImageLayout, VisionReader, patch_blocks


class Lfm2VL(Backbone):
    """`Lfm2VlForConditionalGeneration`; every entry is a picture or a tile, and images vary in size."""

    features_form = "list"
    final_norm_name = "embedding_norm"
    gridded = True

    @property
    def decoder_widths(self) -> DecoderWidths:
        """Widths of the text decoder, whose MLP LFM2 makes narrower than its config says."""
        gate = self.text._modules["layers"][0].feed_forward.w1
        return replace(super().decoder_widths, intermediate=gate.out_features)

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:
        """One image per entry; its number of patches in either direction determines its grid."""
        shapes = arguments.get("spatial_shapes")
        if shapes is None:
            return super().layouts(modality, sizes, arguments)
        merge = self.model.config.downsample_factor
        grids = [(-(-height // merge), -(-width // merge)) for height, width in shapes.tolist()]
        return [[ImageLayout(size, grid)] for size, grid in zip(sizes, grids, strict=True)]

    def reader(self, modality: str = "image") -> VisionReader:  # noqa: ARG002
        """The tower, whose pictures are padded; every block of neighbours becomes a token."""
        merge = self.model.config.downsample_factor

        def members(_: Sequence[int], arguments: Mapping[str, Any]) -> list[Tensor]:
            padded, shapes = arguments["pixel_values"].shape[1], arguments["spatial_shapes"].tolist()
            return [patch_blocks((rows, columns), merge) + i * padded for i, (rows, columns) in enumerate(shapes)]

        def pictures(arguments: Mapping[str, Any]) -> list[int]:
            counts: list[int] = torch.as_tensor(arguments["spatial_shapes"]).prod(1).tolist()
            return counts

        return VisionReader(self.core.vision_tower.encoder, members, pictures=pictures, padded=True)
