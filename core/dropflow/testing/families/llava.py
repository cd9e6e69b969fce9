"""LLaVA-1.5 and Pixtral in miniature."""

from __future__ import annotations

from typing import Any

from dropflow.testing.families.tiny import IMAGE, TEXT, VISION, Tiny, square_pictures


def tiny() -> Tiny:
    """A LLaVA with a CLIP tower of 4 x 4 patches."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    def build() -> Any:
        vision = CLIPVisionConfig(**VISION, image_size=24, patch_size=6)
        config = LlavaConfig(
            text_config=LlamaConfig(**TEXT),
            vision_config=vision,
            image_token_id=IMAGE,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
        return LlavaForConditionalGeneration(config)

    return Tiny(build, {"image": square_pictures(24, 16)})
