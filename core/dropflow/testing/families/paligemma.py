"""PaliGemma in miniature."""

from __future__ import annotations

from typing import Any

import torch

from dropflow.testing.families.tiny import IMAGE, TEXT, VISION, Tiny, square_pictures


def tiny() -> Tiny:
    """A PaliGemma in which the last two tokens of a prompt are the suffix."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    def build() -> Any:
        config = PaliGemmaConfig(
            text_config={**TEXT, "head_dim": 8, "model_type": "gemma"},
            vision_config={
                **VISION,
                "image_size": 24,
                "patch_size": 6,
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
            },
            image_token_id=IMAGE,
            projection_dim=32,
            hidden_size=32,
        )
        return PaliGemmaForConditionalGeneration(config)

    def types(inputs: dict[str, Any]) -> dict[str, Any]:
        after = inputs["attention_mask"].flip(1).cumsum(1).flip(1)
        return inputs | {"token_type_ids": torch.where(after <= 2, 1, 0)}

    return Tiny(build, {"image": square_pictures(24, 16, enclosed=False)}, types)
