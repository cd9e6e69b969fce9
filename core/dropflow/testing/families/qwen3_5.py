"""Qwen3.5 in miniature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dropflow.testing.families.qwen2_vl import packed_image, tokens_and_text, with_token_types
from dropflow.testing.families.qwen3_vl import VISION as WITH_DEEPSTACK
from dropflow.testing.families.qwen3_vl import stamped_video
from dropflow.testing.families.tiny import Tiny

VISION: Mapping[str, Any] = {name: size for name, size in WITH_DEEPSTACK.items() if "deepstack" not in name}
"""Options of a tiny vision encoder."""
DELTA_NET: Mapping[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"] * 3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
    "partial_rotary_factor": 1.0,
}
"""Gated DeltaNet before every layer with full attention."""
ROUND_OFF: Mapping[str, Any] = {"tolerance": 1e-3, "gradient_tolerance": 5e-3}
"""Of the DeltaNet kernel, which computes in float32 whatever the model's dtype."""


def tiny() -> Tiny:
    """A Qwen3.5 whose even layers are recurrent."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    def build() -> Any:
        config = Qwen3_5Config(**tokens_and_text([2, 1, 1], **DELTA_NET), vision_config=dict(VISION))
        return Qwen3_5ForConditionalGeneration(config)

    return Tiny(build, {"image": packed_image, "video": stamped_video}, with_token_types, **ROUND_OFF)
