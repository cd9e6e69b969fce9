"""The kit names a fact that an adapter states wrongly, and the part of the adapter that states it."""

from __future__ import annotations

from typing import Any

import pytest

from dropflow import Backbone, Projections, VisionEncoder, VisionReader, one_to_one
from dropflow.testing import BrokenGuarantee, assert_backbone_conforms, tiny_models
from dropflow_adapters.internvl import InternVL
from dropflow_adapters.llava import Llava


class FourTimesTheTokens(Llava):
    @property
    def tokens_per_image(self) -> int:
        return 64


class SwappedProjections(Llava):
    def projections(self, layer: Any) -> Projections:
        own = layer.self_attn
        return Projections(query=own.k_proj, key=own.q_proj, value=own.v_proj)


class ValuesForKeys(Llava):
    def projections(self, layer: Any) -> Projections:
        own = layer.self_attn
        return Projections(query=own.q_proj, key=own.v_proj, value=own.k_proj)


class ProjectionsOfTheWrongModule(Llava):
    def projections(self, layer: Any) -> Projections:
        return Projections.of(layer.mlp)


class ReaderWithoutLayers(Llava):
    def reader(self, modality: str = "image") -> VisionReader:  # noqa: ARG002
        return VisionReader(self.core.vision_tower, lambda sizes, _: one_to_one(sizes, 1))


class VisionWithoutLayers(Llava):
    @property
    def vision(self) -> VisionEncoder:
        return VisionEncoder(self.core.vision_tower, prefix=1, has_cls=True, feature_layer=2, select_prefix=1)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (FourTimesTheTokens, "an image has 16 tokens, the adapter says 64; see `tokens_per_image` of Four"),
        (SwappedProjections, "fact 'projections' is wrong: .*see `projections` of SwappedProjections"),
        (ValuesForKeys, "the attention rows of layer 0 differ .*see `projections` of ValuesForKeys"),
        (ProjectionsOfTheWrongModule, "fact 'projections' is wrong: of layer 0: .* no attribute 'q_proj'; see"),
        (ReaderWithoutLayers, "expected a list of layers 'layers' in CLIPVisionModel.*encoder.*see `reader`"),
        (VisionWithoutLayers, "expected a list of layers 'layers' in CLIPVisionModel.*encoder.*see `vision`"),
    ],
)
def test_a_wrong_fact_is_named(adapter: type[Backbone], message: str) -> None:
    with pytest.raises(BrokenGuarantee, match=message):
        assert_backbone_conforms(adapter, tiny_models()["llava"][1])


def test_a_core_that_fails_on_the_stated_form_of_features_is_told_from_a_bug() -> None:
    class AsList(InternVL):
        features_form = "list"

    with pytest.raises(BrokenGuarantee, match=r"with `overlap`, the core fails: .*; see `features_form` of AsList"):
        assert_backbone_conforms(AsList, tiny_models()["internvl"][1], thorough=False)
