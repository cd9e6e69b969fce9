"""Qwen3.5-MoE in miniature."""

from __future__ import annotations

from typing import Any

from dropflow.testing.families.qwen2_vl import packed_image, tokens_and_text, with_token_types
from dropflow.testing.families.qwen3_5 import DELTA_NET, ROUND_OFF, VISION
from dropflow.testing.families.qwen3_vl import stamped_video
from dropflow.testing.families.tiny import Tiny


def tiny() -> Tiny:
    """A Qwen3.5 with four experts, of which a token passes through two."""
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    }

    def build() -> Any:
        config = Qwen3_5MoeConfig(**tokens_and_text([2, 1, 1], **DELTA_NET, **experts), vision_config=dict(VISION))
        return Qwen3_5MoeForConditionalGeneration(config)

    return Tiny(build, {"image": packed_image, "video": stamped_video}, with_token_types, **ROUND_OFF)
