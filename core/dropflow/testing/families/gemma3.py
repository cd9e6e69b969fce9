"""Gemma 3 in miniature."""

from __future__ import annotations

from typing import Any

from dropflow.testing.families.tiny import IMAGE, TEXT, VISION, Tiny, square_pictures


def tiny() -> Tiny:
    """A Gemma 3 with a sliding window shorter than the prompt."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    def build() -> Any:
        config = Gemma3Config(
            text_config={**TEXT, "head_dim": 8, "sliding_window": 11, "query_pre_attn_scalar": 8},
            vision_config={**VISION, "image_size": 48, "patch_size": 6, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=16,
            image_token_id=IMAGE,
        )
        return Gemma3ForConditionalGeneration(config)

    def types(inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs | {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}

    return Tiny(build, {"image": square_pictures(48, 16)}, types)
