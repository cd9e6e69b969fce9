"""Llama 4 in miniature."""

from __future__ import annotations

from typing import Any

from dropflow.testing.families.tiny import IMAGE, TEXT, VISION, Tiny, square_pictures


def tiny() -> Tiny:
    """A Llama 4 with chunks shorter than the prompt, a layer without RoPE, and experts in every other layer."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration, __version__

    if __version__ == "5.24.0":
        raise ImportError("transformers 5.24.0: its Llama 4 cannot read images, with a policy or without")

    def build() -> Any:
        config = Llama4Config(
            text_config={
                **TEXT,
                "head_dim": 8,
                "intermediate_size_mlp": 48,
                "attention_chunk_size": 11,
                "no_rope_layer_interval": 3,
                "interleave_moe_layer_step": 2,
                "num_local_experts": 3,
            },
            vision_config={
                **VISION,
                "image_size": 32,
                "patch_size": 4,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
                "vision_output_dim": 16,
                "intermediate_size": 64,
            },
            image_token_index=IMAGE,
        )
        return Llama4ForConditionalGeneration(config)

    return Tiny(build, {"image": square_pictures(32, 16)})
