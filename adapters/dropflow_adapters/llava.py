"""LLaVA-1.5 and Pixtral: a CLIP, SigLIP or Pixtral tower, an MLP projector, and a text decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dropflow import (
    Backbone,
    ImageLayout,
    Projections,
    Sublayers,
    VisionEncoder,
    VisionReader,
    feature_boundary,
    one_to_one,
    square_grid,
)
from dropflow.errors import UnsupportedModel
from dropflow_adapters.pixtral_tower import pixtral_reader

PLAIN = {"clip_vision_model", "siglip_vision_model"}
"""Towers that produce the same number of tokens for every image, row by row."""


def sublayers(layer: Any) -> Sublayers:
    """Parts of a vision layer, which have the same names in CLIP and SigLIP."""
    return Sublayers(layer.self_attn, layer.mlp)


class Llava(Backbone):
    """`LlavaForConditionalGeneration`; with a Pixtral tower images vary in size, and row breaks are text tokens."""

    features_form = "list"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._tower = model.config.vision_config
        if self._tower.model_type not in PLAIN | {"pixtral"}:
            raise UnsupportedModel(
                f"llava: expected a CLIP, SigLIP or Pixtral vision tower, got {self._tower.model_type!r}; "
                "write an adapter for it"
            )
        self.gridded = self._tower.model_type == "pixtral"

    @property
    def vision(self) -> VisionEncoder | None:
        """The tower's encoder; `None` for packed images, or where features of several layers are concatenated."""
        config = self.model.config
        layer = config.vision_feature_layer
        if not isinstance(layer, int) or layer == 0 or self._tower.model_type not in PLAIN:
            return None
        has_cls = self._tower.model_type == "clip_vision_model"
        # hidden_states[0] is the embedding, so entry i is the output of layer i - 1
        layer = layer if layer >= 0 else layer + self._tower.num_hidden_layers + 1
        keeps_prefix = has_cls and config.vision_feature_select_strategy == "full"
        projector = None if keeps_prefix else self.core.multi_modal_projector
        encoder = self.core.vision_tower.encoder
        return VisionEncoder(encoder, int(has_cls), has_cls, layer, int(keeps_prefix), projector, sublayers)

    def reader(self, modality: str = "image") -> VisionReader | None:
        """The tower, also where its images are packed, or where features of several layers are concatenated."""
        config, tower = self.model.config, self.core.vision_tower
        if self._tower.model_type == "pixtral":
            return pixtral_reader(tower, config.vision_feature_layer, merge=1)
        if self.vision is not None or config.vision_feature_layer == 0:
            return super().reader(modality)
        has_cls = self._tower.model_type == "clip_vision_model"
        kept = int(has_cls and config.vision_feature_select_strategy == "full")
        return VisionReader(
            tower.encoder,
            lambda sizes, _: one_to_one(sizes, int(has_cls), kept),
            prefix=int(has_cls),
            has_cls=has_cls,
            feature_layer=feature_boundary(config.vision_feature_layer, self._tower.num_hidden_layers),
        )

    def projections(self, layer: Any) -> Projections | None:
        """Projections of a decoder layer with attention, which have the same names in Llama, Mistral and Qwen."""
        attention = getattr(layer, "self_attn", None)
        return None if attention is None else Projections.of(attention)

    @property
    def tokens_per_image(self) -> int | None:
        """Number of tokens per image: its patches, plus the CLS token unless the `default` strategy removes it."""
        if self._tower.model_type not in PLAIN:
            return None
        patches = int((self._tower.image_size // self._tower.patch_size) ** 2)
        has_cls = int(self._tower.model_type == "clip_vision_model")
        return patches + has_cls - int(self.model.config.vision_feature_select_strategy == "default")

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of patches; `None` for a number that is not a square, such as patches plus CLS."""
        return square_grid(tokens) if self._tower.model_type in PLAIN else None

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:
        """One image per entry; with Pixtral, the image sizes in pixels determine the grids."""
        pixels = arguments.get("image_sizes")
        if self._tower.model_type in PLAIN or pixels is None:
            return super().layouts(modality, sizes, arguments)
        patch = self._tower.patch_size
        return [[ImageLayout(n, (int(h) // patch, int(w) // patch))] for n, (h, w) in zip(sizes, pixels, strict=True)]
