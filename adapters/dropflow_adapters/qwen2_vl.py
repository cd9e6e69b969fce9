"""Qwen2-VL: a packed ViT whose patches are merged 2 x 2, and multimodal RoPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dropflow import Backbone, ImageLayout, PackedTables, PackedTower


class Qwen2VL(Backbone):
    """`Qwen2VLForConditionalGeneration`; images vary in size, and every frame pair of a video is an image."""

    modalities = ("image", "video")
    gridded = True

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

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:
        """One image per time step, from the grid (time, height, width) of patches after the merger."""
        patches = arguments.get(f"{modality}_grid_thw")
        if patches is None:
            return super().layouts(modality, sizes, arguments)
        merge = self.model.config.vision_config.spatial_merge_size
        grids = [(t, h // merge, w // merge) for t, h, w in patches.tolist()]
        return [[ImageLayout(h * w, (h, w))] * t for t, h, w in grids]
