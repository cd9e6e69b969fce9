"""Gemma 3: a SigLIP tower pooled to a fixed number of tokens, which see each other in both directions."""

from __future__ import annotations

from typing import Any

from dropflow import Backbone
from dropflow.backbone.backbone import square
from dropflow.testing.tiny import IMAGE, TEXT, VISION, Tiny, square_pictures


class Gemma3(Backbone):
    """`Gemma3ForConditionalGeneration`; every image (a crop of pan-and-scan is one) has the same number of tokens."""

    @property
    def tokens_per_image(self) -> int:
        """Tokens behind the pooling."""
        return int(self.model.config.mm_tokens_per_image)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of pooled patches."""
        return square(tokens)

    @classmethod
    def tiny(cls) -> Tiny:
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
