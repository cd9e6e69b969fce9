"""Qwen2-VL: a packed ViT whose patches are merged 2 x 2, and multimodal RoPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dropflow import Backbone, ImageLayout, PackedTables, PackedTower, VisionReader

Grid = tuple[int, int, int]
"""Time steps, and rows and columns of each, in tokens of the LLM."""


class Qwen2VL(Backbone):
    """`Qwen2VLForConditionalGeneration`; images vary in size, and every frame pair of a video is an image."""

    modalities = ("image", "video")
    gridded = True
    features_form = "list"

    @property
    def packed_tower(self) -> PackedTower | None:
        """The ViT; where it has deepstack mergers, they join the same units."""
        tower = self.core.visual
        unit, mergers = tower.spatial_merge_size**2, (tower.merger, *tower._modules.get("deepstack_merger_list", ()))
        return PackedTower(
            tower, unit, mergers, lambda given: (given["grid_thw"].prod(-1) // unit).tolist(), self.tables
        )

    def tables(self, arguments: Mapping[str, Any]) -> PackedTables:
        """Positions, one segment per time step, and the interpolation of learned positions where the ViT has them."""
        from transformers import vision_utils as tables

        grid, tower = arguments["grid_thw"], self.core.visual
        rows = {"position_ids": tables.get_vision_position_ids(grid, tower.spatial_merge_size)}
        if "pos_embed" in tower._modules:
            rows["interp_indices"], rows["interp_weights"] = tables.get_vision_interpolation_indices_and_weights(
                grid,
                num_grid_per_side=tower.num_grid_per_side,
                mode=tower.interpolation_mode,
                align_corners=tower.interpolation_align_corners,
                spatial_merge_size=tower.spatial_merge_size,
            )
        return PackedTables(rows, {"cu_seqlens": tables.get_vision_cu_seqlens(grid)})

    @property
    def deepstack_levels(self) -> int:
        """Blocks of the ViT whose rows are added after the first decoder layers, in Qwen3-VL."""
        return len(getattr(self.model.config.vision_config, "deepstack_visual_indexes", None) or ())

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:
        """One image per time step, from the grid (time, height, width) of patches after the merger."""
        if arguments.get(f"{modality}_grid_thw") is None:
            return super().layouts(modality, sizes, arguments)
        return [[ImageLayout(h * w, (h, w))] * t for t, h, w in self._grids(modality, arguments)]

    def reader(self, modality: str = "image") -> VisionReader | None:
        """The packed tower: it holds the patches of a token side by side."""
        vision = self.core.visual

        def members(_: Sequence[int], arguments: Mapping[str, Any]) -> list[Tensor]:
            grids = self._grids(modality, arguments)
            counts = [t * h * w for t, h, w in grids]
            starts = accumulate(counts, initial=0)  # and the total, which no grid takes
            units = torch.cat([self._units(grid) + start for grid, start in zip(grids, starts, strict=False)])
            rows = units[:, None] * self._merge**2 + torch.arange(self._merge**2)
            return list(torch.split(rows, counts))

        def pictures(arguments: Mapping[str, Any]) -> list[int]:
            return [h * w * self._merge**2 for t, h, w in self._grids(modality, arguments) for _ in range(t)]

        return VisionReader(vision, members, layers="blocks", pictures=pictures)

    @property
    def _merge(self) -> int:
        return int(self.model.config.vision_config.spatial_merge_size)

    def _grids(self, modality: str, arguments: Mapping[str, Any]) -> list[Grid]:
        patches = arguments[f"{modality}_grid_thw"].tolist()
        return [(t, h // self._merge, w // self._merge) for t, h, w in patches]

    def _units(self, grid: Grid) -> Tensor:
        """For each token of an image or video, the place of its patches in the tower, counted in tokens."""
        t, h, w = grid
        return torch.arange(t * h * w)
