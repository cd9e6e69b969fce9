"""Qwen2.5-VL: Qwen2-VL with window attention in the ViT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dropflow import PackedTables
from dropflow_adapters.qwen2_vl import Grid, Qwen2VL


class Qwen25VL(Qwen2VL):
    """`Qwen2_5_VLForConditionalGeneration`; images and videos are laid out as in Qwen2-VL."""

    def tables(self, arguments: Mapping[str, Any]) -> PackedTables:
        """Those of Qwen2-VL, and the windows, in whose order the blocks see the units."""
        from transformers.vision_utils import get_vision_window_index

        tower, plain = self.core.visual, super().tables(arguments)
        order, windows = get_vision_window_index(
            arguments["grid_thw"], tower.spatial_merge_size, tower.window_size, tower.patch_size
        )
        return PackedTables(plain.rows, {**plain.borders, "cu_window_seqlens": windows}, ("window_index", order))

    def _units(self, grid: Grid) -> Tensor:
        """The tower holds the tokens of a time step window by window, each in raster order."""
        vision = self.model.config.vision_config
        side = vision.window_size // vision.patch_size // self._merge
        t, row, column = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
        across = grid[2] // side + 1
        window = (t * (grid[1] // side + 1) + row // side) * across + column // side
        inside = row % side * side + column % side
        return torch.argsort(torch.argsort((window * side**2 + inside).flatten()))
