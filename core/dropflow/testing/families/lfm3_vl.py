"""LFM3-VL in miniature."""

from __future__ import annotations

from typing import Any

from dropflow.testing.families.qwen2_vl import packed_image, packed_video
from dropflow.testing.families.tiny import END, IMAGE, START, TEXT, VIDEO, VISION, Tiny


def tiny() -> Tiny:
    """An LFM3-VL with short convolutions, full attention and a sliding window of nine tokens."""
    from transformers import Lfm3VlConfig, Lfm3VlForConditionalGeneration

    kinds = ["conv", "full_attention", "conv", "sliding_attention", "full_attention", "conv"]
    text = {**TEXT, "model_type": "lfm3", "layer_types": kinds, "head_dim": 8, "sliding_window": 9}
    vision = {
        **VISION,
        "num_key_value_heads": 1,
        "patch_size": 4,
        "layer_types": ["conv", "full_attention", "full_attention"],
    }

    def build() -> Any:
        config = Lfm3VlConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=END,
            projector_hidden_size=32,
            tie_word_embeddings=False,
        )
        return Lfm3VlForConditionalGeneration(config)

    return Tiny(build, {"image": packed_image, "video": packed_video})
