"""Qwen3-VL: deepstack features of early ViT layers are added after the first decoder layers."""

from __future__ import annotations

from dropflow_adapters.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    """`Qwen3VLForConditionalGeneration`; every frame pair of a video is separate and follows its timestamp."""
