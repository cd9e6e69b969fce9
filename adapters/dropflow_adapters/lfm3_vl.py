"""LFM3-VL: a packed tower with convolutions over the grid, and short convolutions between attention layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dropflow_adapters.qwen2_vl import Qwen2VL


class Lfm3VL(Qwen2VL):
    """`Lfm3VlForConditionalGeneration`; images and videos are laid out as in Qwen2-VL."""

    @property
    def packed_tower(self) -> None:
        """None: the tower's convolutions over the grid need every patch."""
        return

    @property
    def final_norm(self) -> Callable[[Tensor], Tensor]:
        """The norm after the last layer, which LFM3 calls `embedding_norm`."""
        norm: Callable[[Tensor], Tensor] = self.text.embedding_norm
        return norm

    def reader(self, modality: str = "image") -> None:
        """Nothing that stages could rely on: some layers of the tower have a convolution instead of attention."""
