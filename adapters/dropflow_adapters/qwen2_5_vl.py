"""Qwen2.5-VL: Qwen2-VL with window attention in the ViT."""

from __future__ import annotations

from dropflow_adapters.qwen2_vl import Qwen2VL


class Qwen25VL(Qwen2VL):
    """`Qwen2_5_VLForConditionalGeneration`; images and videos are laid out as in Qwen2-VL."""
