"""Qwen2.5-VL: Qwen2-VL with window attention in the ViT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dropflow import PackedTables
from dropflow_adapters.qwen2_vl import Qwen2VL


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
