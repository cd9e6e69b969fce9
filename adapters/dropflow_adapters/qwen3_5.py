"""Qwen3.5 and Qwen3.5-MoE: Gated DeltaNet layers between layers with full attention, and the tower of Qwen3-VL."""

from __future__ import annotations

from dropflow_adapters.qwen2_vl import Qwen2VL


class Qwen35(Qwen2VL):
    """`Qwen3_5ForConditionalGeneration` and `Qwen3_5MoeForConditionalGeneration`; there is no deepstack."""
