"""MiniCPM-V 4.6: a packed tower that merges 4 x 4 patches in two steps, and Qwen3.5's text decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dropflow import Backbone, ImageLayout, VisionReader, patch_blocks


class MiniCPMV46(Backbone):
    """`MiniCPMV4_6ForConditionalGeneration`; every entry is a picture, a slice or a frame, and images vary in size."""

    features_form = "list"
    modalities = ("image", "video")
    unstated_videos = frozenset({"video"})
    gridded = True

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:
        """One image per entry; its number of patches in either direction determines its grid."""
        grids = self._patches(modality, arguments)
        if grids is None:
            return super().layouts(modality, sizes, arguments)
        config = self.model.config
        merge = config.merge_kernel_size[0] ** config.merger_times * (2 if self._merges(arguments) else 1)
        return [
            [ImageLayout(size, (height // merge, width // merge))]
            for size, (height, width) in zip(sizes, grids, strict=True)
        ]

    def reader(self, modality: str = "image") -> VisionReader:
        """The layers of the tower after those whose rows a merger joins, 2 x 2; the last merger joins blocks again."""
        config, encoder = self.model.config, self.core.vision_tower.encoder
        side = config.merge_kernel_size[0] ** config.merger_times

        def grids(arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
            halves = 2 if self._merges(arguments) else 1
            return [(height // halves, width // halves) for height, width in self._patches(modality, arguments) or []]

        def members(_: Sequence[int], arguments: Mapping[str, Any]) -> list[Tensor]:
            found, first = [], 0
            for rows, columns in grids(arguments):
                found.append(patch_blocks((rows, columns), side) + first)
                first += rows * columns
            return found

        return VisionReader(
            encoder,
            members,
            first=config.vision_config.insert_layer_id + 1,
            pictures=lambda arguments: [rows * columns for rows, columns in grids(arguments)],
        )

    def _merges(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the call joins 2 x 2 rows inside the tower."""
        mode: str = arguments.get("downsample_mode") or self.model.config.downsample_mode
        return mode != "4x"

    def _patches(self, modality: str, arguments: Mapping[str, Any]) -> list[list[int]] | None:
        """Patches of every image in either direction, where the call gives them."""
        shapes = arguments.get("target_sizes_videos" if modality == "video" else "target_sizes")
        shapes = arguments.get("target_sizes") if shapes is None else shapes
        return None if shapes is None else torch.as_tensor(shapes).tolist()
