"""DeepSeek-VL: a SigLIP tower, an MLP projector, and a Llama decoder."""

from typing import Any

from dropflow import Backbone, Projections, VisionEncoder
from dropflow.backbone.backbone import square
from dropflow.testing.tiny import IMAGE, TEXT, VISION, Tiny, square_pictures


class DeepseekVL(Backbone):
    """`DeepseekVLForConditionalGeneration`; every image has the same number of tokens, row by row."""

    @property
    def tokens_per_image(self) -> int:
        """One token per patch: SigLIP has no CLS token, and the projector joins no patches."""
        tower = self.model.config.vision_config
        return int((tower.image_size // tower.patch_size) ** 2)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of patches."""
        return square(tokens)

    @property
    def vision(self) -> VisionEncoder:
        """The tower's layers; the output of the last one goes to the projector."""
        encoder = self.core.vision_model.encoder
        return VisionEncoder(encoder, prefix=0, has_cls=False, feature_layer=len(encoder.layers), select_prefix=0)

    def projections(self, layer: Any) -> Projections:
        """Llama's."""
        attention = layer.self_attn
        return Projections(attention.q_proj, attention.k_proj, attention.v_proj)

    @classmethod
    def tiny(cls) -> Tiny:
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
