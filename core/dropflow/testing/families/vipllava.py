"""ViP-LLaVA in miniature."""

from __future__ import annotations

from typing import Any

from dropflow.testing.families.tiny import IMAGE, TEXT, VISION, Tiny, square_pictures


def tiny() -> Tiny:
    """A ViP-LLaVA that joins the features of three layers of a CLIP tower of 4 x 4 patches."""
    from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

    fields = VipLlavaConfig.__dataclass_fields__  # transformers 5.20 calls it by the plural
    layers = "vision_feature_layer" if "vision_feature_layer" in fields else "vision_feature_layers"

    def build() -> Any:
        config = VipLlavaConfig(
            text_config={**TEXT, "model_type": "llama"},
            vision_config={**VISION, "image_size": 24, "patch_size": 6, "model_type": "clip_vision_model"},
            image_token_index=IMAGE,
            **{layers: [-1, -2, 1]},
        )
        return VipLlavaForConditionalGeneration(config)

    return Tiny(build, {"image": square_pictures(24, 16)})
