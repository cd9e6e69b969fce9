"""DeepSeek-VL in miniature: a random model made from config classes, and pictures for it."""

from typing import Any

from dropflow.testing import IMAGE, TEXT, VISION, Tiny, square_pictures


def tiny() -> Tiny:
    """A DeepSeek-VL with 4 x 4 patches per image."""
    from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration

    def build() -> Any:
        config = DeepseekVLConfig(
            text_config={**TEXT, "model_type": "llama"},
            vision_config={**VISION, "model_type": "siglip_vision_model", "image_size": 24, "patch_size": 6},
            image_token_id=IMAGE,
        )
        return DeepseekVLForConditionalGeneration(config)

    return Tiny(build, {"image": square_pictures(24, 16)})
