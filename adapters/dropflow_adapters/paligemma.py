"""PaliGemma: a SigLIP tower, and a prompt that sees itself in both directions."""

from __future__ import annotations

from typing import Any

import torch

from dropflow import Backbone, Sublayers, VisionEncoder
from dropflow.backbone.backbone import square
from dropflow.testing.tiny import IMAGE, TEXT, VISION, Tiny, square_pictures


class PaliGemma(Backbone):
    """`PaliGemmaForConditionalGeneration`; every image has the same number of tokens."""

    @property
    def vision(self) -> VisionEncoder:
        """The tower's encoder: each patch is projected on its own, and there is no CLS row."""
        encoder, depth = self.core.vision_tower.encoder, self.model.config.vision_config.num_hidden_layers
        return VisionEncoder(
            encoder,
            prefix=0,
            has_cls=False,
            feature_layer=depth,
            select_prefix=0,
            projector=self.core.multi_modal_projector,
            sublayers=lambda layer: Sublayers(layer.self_attn, layer.mlp),
        )

    @property
    def tokens_per_image(self) -> int:
        """Patches of the tower."""
        vision = self.model.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of patches."""
        return square(tokens)

    @classmethod
    def tiny(cls) -> Tiny:
        """A PaliGemma whose last two tokens of a prompt are the suffix."""
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
            behind = inputs["attention_mask"].flip(1).cumsum(1).flip(1)
            return inputs | {"token_type_ids": torch.where(behind <= 2, 1, 0)}

        return Tiny(build, {"image": square_pictures(24, 16, enclosed=False)}, types)
