"""Gemma 4 Unified in miniature."""

from __future__ import annotations

from functools import partial
from typing import Any

from dropflow.testing.families.gemma4 import TEXT_4, padded_frames, padded_image
from dropflow.testing.families.qwen2_vl import with_token_types
from dropflow.testing.families.tiny import IMAGE, VIDEO, Tiny

PATCH = 8
"""Pixels of a merged patch in either direction, which becomes one token."""


def tiny() -> Tiny:
    """A Gemma 4 without towers, whose images attend to each other in sliding layers, and with shared keys."""
    from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

    text = {name: value for name, value in TEXT_4.items() if "per_layer_input" not in name}

    def build() -> Any:
        config = Gemma4UnifiedConfig(
            text_config=text | {"use_bidirectional_attention": "vision"},
            vision_config={"patch_size": PATCH // 2, "pooling_kernel_size": 2, "mm_embed_dim": 16, "mm_posemb_size": 32}
            | {"output_proj_dims": 16},
            audio_config=None,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=96,
            tie_word_embeddings=False,
        )
        return Gemma4UnifiedForConditionalGeneration(config)

    pictures = {
        "image": partial(padded_image, pool=1, patch=PATCH),
        "video": partial(padded_frames, pool=1, patch=PATCH),
    }
    return Tiny(build, pictures, with_token_types, tolerance=3e-5)
