"""LFM3-VL: a packed tower with convolutions over the grid, and short convolutions between attention layers."""

from __future__ import annotations

from dropflow_adapters.qwen2_vl import Qwen2VL


class Lfm3VL(Qwen2VL):
    """`Lfm3VlForConditionalGeneration`; images and videos are laid out as in Qwen2-VL."""

    final_norm_name = "embedding_norm"

    @property
    def packed_tower(self) -> None:
        """None: the tower's convolutions over the grid need every patch."""
        return

    def reader(self, modality: str = "image") -> None:
        """Nothing that stages could rely on: some layers of the tower have a convolution instead of attention."""
