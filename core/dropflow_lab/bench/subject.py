"""The model the engine is measured on: random weights in the shape of LLaVA, so wide that work outweighs overhead."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

_IMAGE_TOKEN = 1


@dataclass(frozen=True)
class SubjectShape:
    """Sizes of the model and of its one prompt; the vision tower is kept negligible."""

    layers: int = 16
    hidden: int = 512
    intermediate: int = 1376
    heads: int = 8
    image_side: int = 24
    """Patches along one side of the image."""
    text_tokens: int = 64
    vocabulary: int = 1024
    vision_hidden: int = 64
    """Width of the vision tower; its heads are 64 wide, too."""
    vision_layers: int = 1

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the one image."""
        return self.image_side**2


def build_model(shape: SubjectShape) -> LlavaForConditionalGeneration:
    """Return the model in float32 with SDPA attention, always with the same weights."""
    text = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=4096,
    )
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_hidden,
        intermediate_size=2 * shape.vision_hidden,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_hidden // 64,
        image_size=shape.image_side * 14,
        patch_size=14,
        projection_dim=64,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=_IMAGE_TOKEN,
        image_seq_length=shape.visual_tokens,
        vision_feature_layer=-1,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).eval()


def twin(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Return a second model on the same weights, so that a policy can be attached to one and not to the other."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def build_prompt(shape: SubjectShape) -> dict[str, Any]:
    """Return the inputs of one prefill: text, one image, text."""
    before = shape.text_tokens // 2
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, shape.vocabulary, (1, shape.text_tokens + shape.visual_tokens), generator=generator)
    ids[:, before : before + shape.visual_tokens] = _IMAGE_TOKEN
    side = shape.image_side * 14
    pixels = torch.randn((1, 3, side, side), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def prefill_of(model: Any, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """Return one prefill as `generate` runs it, to be called: a fresh cache, logits of the last token only."""
    return lambda: model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
