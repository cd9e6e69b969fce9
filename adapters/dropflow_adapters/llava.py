"""LLaVA-1.5: a CLIP or SigLIP tower, an MLP projector, and a Llama, Mistral or Qwen2 text decoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dropflow import Backbone, Projections, VisionEncoder
from dropflow.errors import UnsupportedModel


class Llava(Backbone):
    """`LlavaForConditionalGeneration`; every image has the same number of tokens, laid out row by row."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        kind = model.config.vision_config.model_type
        if kind not in {"clip_vision_model", "siglip_vision_model"}:
            raise UnsupportedModel(
                f"llava: expected a CLIP or SigLIP vision tower, got {kind!r}; write an adapter for it"
            )

    @property
    def vision(self) -> VisionEncoder | None:
        """The tower's encoder; `None` where features of several layers are concatenated, as no one layer owns them."""
        config = self.model.config
        layer = config.vision_feature_layer
        if not isinstance(layer, int) or layer == 0:
            return None
        has_cls = config.vision_config.model_type == "clip_vision_model"
        # hidden_states[0] is the embedding, so entry i is the output of layer i - 1
        layer = layer if layer >= 0 else layer + config.vision_config.num_hidden_layers + 1
        keeps_prefix = has_cls and config.vision_feature_select_strategy == "full"
        return VisionEncoder(self.core.vision_tower.encoder, int(has_cls), has_cls, layer, int(keeps_prefix))

    def projections(self, layer: Any) -> Projections:
        """Llama, Mistral and Qwen2 share the names of their projections."""
        attention = layer.self_attn
        return Projections(attention.q_proj, attention.k_proj, attention.v_proj)

    @property
    def tokens_per_image(self) -> int:
        """Patches of one image, and the CLS token where there is one, less the first row where `default` cuts it."""
        config = self.model.config
        vision = config.vision_config
        patches = int((vision.image_size // vision.patch_size) ** 2)
        has_cls = int(vision.model_type == "clip_vision_model")
        return patches + has_cls - int(config.vision_feature_select_strategy == "default")

    def placeholders(self, input_ids: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """Tokens with the config's `image_token_id`."""
        token: int = self.model.config.image_token_id
        return input_ids == token

    def embedded_placeholders(self, inputs_embeds: Tensor) -> Bool[Tensor, "batch tokens"]:
        """Tokens whose embedding is that of `image_token_id`, as LLaVA itself finds them."""
        table = self.model.get_input_embeddings()
        token = torch.tensor(self.model.config.image_token_id, device=inputs_embeds.device)
        embedded: Tensor = table(token)
        return (inputs_embeds == embedded).all(-1)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of patches; `None` for a number that is no square, such as patches plus CLS."""
        side = math.isqrt(tokens)
        return (side, side) if side * side == tokens else None
