"""What the LLaVA adapter says of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import IMAGE, prompt, tiny_llava
from transformers import LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig, ViTConfig

from dropflow.backbone.backbone import FACTS, backbone_for
from dropflow.errors import UnsupportedModel
from dropflow.units import BackboneShape


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_facts(tower: str) -> None:
    model = tiny_llava(tower=tower)
    backbone = backbone_for(model)
    assert backbone.shape == BackboneShape(6, 16)
    assert backbone.core is model.model
    assert backbone.text is model.model.language_model
    assert backbone.grid(16) == (4, 4)
    assert backbone.grid(17) is None
    given = set(FACTS) - {"units"}
    assert backbone.facts() == (given if tower == "clip" else given - {"cls"})
    vision = backbone.vision
    assert vision is not None
    assert vision.owner is model.model.vision_tower.encoder
    assert (vision.prefix, vision.has_cls, vision.feature_layer, vision.select_prefix) == (
        int(tower == "clip"),
        tower == "clip",
        3,
        0,
    )
    widths = backbone.decoder_widths
    assert (widths.hidden, widths.intermediate, widths.heads, widths.kv_heads, widths.head_dim) == (32, 48, 4, 2, 8)


@torch.no_grad()
def test_placeholders_are_found_by_id_and_by_embedding(llava: Any) -> None:
    backbone, inputs = backbone_for(llava), prompt()
    expected = inputs["input_ids"] == IMAGE
    assert expected.sum() == 48
    assert torch.equal(backbone.placeholders(inputs["input_ids"]), expected)
    found = backbone.embedded_placeholders(llava.get_input_embeddings()(inputs["input_ids"]))
    assert torch.equal(found, expected)
    assert backbone.has_images(inputs)
    assert not backbone.has_images({"pixel_values": None, "mm_encoder_outputs": {"image": None}})


def test_the_full_strategy_keeps_the_cls_token(llava: Any) -> None:
    model = tiny_llava()
    model.config.vision_feature_select_strategy = "full"
    backbone = backbone_for(model)
    assert backbone.tokens_per_image == 17
    assert backbone.vision is not None
    assert backbone.vision.select_prefix == 1
    assert "grid" not in backbone.facts()
    model.config.vision_feature_layer = [-2, -1]
    assert backbone.vision is None
    assert backbone_for(llava).tokens_per_image == 16


def test_a_pixtral_tower_has_images_of_any_size_and_another_tower_is_refused() -> None:
    text = tiny_llava().config.text_config
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    pixtral = PixtralVisionConfig(**sizes, image_size=16, patch_size=8)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=pixtral, vision_feature_layer=-1))
    backbone = backbone_for(model)
    assert backbone.tokens_per_image is None
    assert backbone.vision is None
    model.config.vision_config = ViTConfig(**sizes, image_size=16, patch_size=8)
    with pytest.raises(UnsupportedModel, match="expected a CLIP, SigLIP or Pixtral vision tower, got 'vit'"):
        backbone_for(model)
