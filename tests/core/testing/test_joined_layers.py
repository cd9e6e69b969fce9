"""Rows cannot be dropped inside a vision encoder if features of several layers are joined, as in ViP-LLaVA."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

import dropflow
from dropflow import Backbone, VisionEncoder, square_grid
from dropflow.engine.attach import vision_refusals
from dropflow.errors import PolicyError
from dropflow.testing import (
    IMAGE,
    TEXT,
    VISION,
    BrokenGuarantee,
    Tiny,
    assert_backbone_conforms,
    square_pictures,
    stage_entry,
)


def build() -> Any:
    config = VipLlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**VISION, image_size=24, patch_size=6),
        image_token_index=IMAGE,
        vision_feature_layers=[0, -1],
    )
    config.image_token_id = IMAGE
    return VipLlavaForConditionalGeneration(config)


TINY = Tiny(build, {"image": square_pictures(24, 16)})


class Plain(Backbone):
    """An adapter that knows nothing of the vision side."""

    @property
    def tokens_per_image(self) -> int:
        return 16

    def grid(self, tokens: int) -> tuple[int, int] | None:
        return square_grid(tokens)


class OneLayer(Plain):
    """Wrongly states that the features come from one layer."""

    @property
    def vision(self) -> VisionEncoder:
        encoder = self.core.vision_tower.encoder
        return VisionEncoder(encoder, 1, True, 2, 0, self.core.multi_modal_projector)


@pytest.mark.parametrize("stage", ["visionzip/dominant-contextual", "mustdrop/key-set"])
def test_stages_inside_such_an_encoder_are_refused_by_name(stage: str) -> None:
    model, (_, entry) = TINY.model(), stage_entry(stage)
    with pytest.raises(PolicyError, match=r"^stages\.s: works inside.*joins the features of several of its layers"):
        dropflow.attach(model, {"name": "x", "stages": {"s": entry}}, adapter=OneLayer)


def test_the_kit_finds_an_adapter_that_takes_them_for_one_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert assert_backbone_conforms(Plain, TINY) < 1e-5
    wide = r"OneLayer \(images\): the fact 'vision_layers' is wrong: layer 1 of the encoder returns rows of 16 numbers,"
    with pytest.raises(BrokenGuarantee, match=wide):
        assert_backbone_conforms(OneLayer, TINY)

    class Unprojected(OneLayer):
        @property
        def vision(self) -> VisionEncoder:
            return VisionEncoder(self.core.vision_tower.encoder, 1, True, 2, 0)

    inside = r"the fact 'vision_layers' is wrong: rows cannot be dropped inside the encoder: .*; see `vision`"
    with pytest.raises(BrokenGuarantee, match=inside):
        assert_backbone_conforms(Unprojected, TINY)
    monkeypatch.setattr(
        vision_refusals, "_joined_layers", lambda _: ""
    )  # as for a model whose config names it differently
    with pytest.raises(BrokenGuarantee, match=inside):
        assert_backbone_conforms(Unprojected, TINY)
