"""DeepSeek-VL: a SigLIP tower, an MLP projector, and a Llama decoder."""

from typing import Any

from dropflow import Backbone, Projections, VisionEncoder, square_grid


class DeepseekVL(Backbone):
    """`DeepseekVLForConditionalGeneration`; every image has the same number of tokens, row by row."""

    @property
    def tokens_per_image(self) -> int:
        """One token per patch: SigLIP has no CLS token, and the projector joins no patches."""
        tower = self.model.config.vision_config
        return int((tower.image_size // tower.patch_size) ** 2)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of patches."""
        return square_grid(tokens)

    @property
    def vision(self) -> VisionEncoder:
        """The tower's layers; the output of the last one goes to the projector."""
        encoder = self.core.vision_model.encoder
        return VisionEncoder(encoder, prefix=0, has_cls=False, feature_layer=len(encoder.layers), select_prefix=0)

    def projections(self, layer: Any) -> Projections:
        """Llama's."""
        return Projections.of(layer.self_attn)
