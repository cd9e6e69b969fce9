"""Qwen3-VL-MoE in miniature."""

from __future__ import annotations

from typing import Any

from dropflow.testing.families.qwen2_vl import packed_image, tokens_and_text, with_token_types
from dropflow.testing.families.qwen3_vl import VISION, stamped_video
from dropflow.testing.families.tiny import Tiny


def tiny() -> Tiny:
    """A Qwen3-VL-MoE of four experts, of which each token takes two, with two deepstack layers."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 8}

    def build() -> Any:
        config = Qwen3VLMoeConfig(**tokens_and_text([2, 1, 1], **experts), vision_config=VISION)
        return Qwen3VLMoeForConditionalGeneration(config)

    return Tiny(build, {"image": packed_image, "video": stamped_video}, with_token_types)
