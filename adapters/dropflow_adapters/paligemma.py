"""PaliGemma: a SigLIP tower, and a prompt with bidirectional attention."""

from __future__ import annotations

from dropflow import Backbone, Sublayers, VisionEncoder, square_grid


class PaliGemma(Backbone):
    """`PaliGemmaForConditionalGeneration`; every image has the same number of tokens."""

    features_form = "tensor"
    bidirectional = "prompt"

    @property
    def vision(self) -> VisionEncoder:
        """The tower's encoder: each patch is projected separately, and there is no CLS row."""
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
        """Number of patches that the tower makes of an image."""
        vision = self.model.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of patches."""
        return square_grid(tokens)
