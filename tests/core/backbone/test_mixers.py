"""What mixes the tokens of a decoder layer, read from configs and modules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hybrids import llava_nemotron_h

from dropflow import backbone_for
from dropflow.backbone import flops
from dropflow.backbone.mixers import Mixer, mixers_of, shape_of
from dropflow.testing import tiny_models
from dropflow.units import BackboneShape


def config(**facts: Any) -> Any:
    return SimpleNamespace(num_hidden_layers=4, **facts)


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("facts", "kinds"),
    [
        ({}, ["attention"] * 4),
        ({"layer_types": None}, ["attention"] * 4),
        ({"layer_types": [SLIDING, FULL] * 2}, ["attention"] * 4),
        ({"layer_types": ["conv", FULL, "linear_attention", "moe"]}, ["recurrent", "attention", "recurrent", "none"]),
        ({"layer_types": [FULL, "mlp", "hybrid", "indexed_attention"]}, ["attention", "none", "other", "other"]),
        ({"layer_types": [FULL] * 4, "num_kv_shared_layers": 2}, ["attention"] * 2 + ["shared"] * 2),
        (
            {"layer_types": [FULL] * 4, "kv_sharing_modes": [None, "store", None, "reuse"]},
            ["attention"] * 3 + ["shared"],
        ),
        ({"layer_types": [FULL, SLIDING] * 2, "num_kv_shared_layers": 3}, ["attention", "other", "shared", "other"]),
    ],
)
def test_kinds_of_layers(facts: dict[str, Any], kinds: list[str]) -> None:
    assert [mixer.kind for mixer in mixers_of(config(**facts))] == kinds


def test_a_sharer_reads_the_keys_of_the_last_layer_of_its_kind() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    found = mixers_of(config(layer_types=kinds, num_kv_shared_layers=2))
    assert [mixer.producer for mixer in found] == [None, None, 0, 1]


def test_modules_tell_recurrent_layers_where_the_config_lists_no_kinds() -> None:
    model = tiny_models()["qwen3_5"][1].build()
    layers = model.get_decoder().layers
    found = mixers_of(SimpleNamespace(num_hidden_layers=6), layers)
    assert [mixer.kind for mixer in found] == ["recurrent", "attention"] * 3


def test_layers_without_attention_rank_by_the_last_one_before_them() -> None:
    mixers = [Mixer("recurrent", "conv"), Mixer("attention", "full_attention"), Mixer("none", "moe")]
    shape = shape_of(mixers, None)
    assert shape.attending == (1,)
    assert [shape.ranks_by(layer) for layer in range(3)] == [None, 1, 1]
    assert [shape.attends(layer) for layer in range(3)] == [False, True, False]
    assert shape_of(mixers[1:2] * 2, 9) == BackboneShape(2, 9)
    assert BackboneShape(3, None).ranks_by(2) == 2


def test_the_work_of_layers_without_attention_is_that_of_their_weights() -> None:
    backbone = backbone_for(tiny_models()["lfm2_vl"][1].build())
    d, m, kernel = 32, backbone.decoder_widths.intermediate, 3
    convolution = 3 * d * d + d * kernel + d * d + 3 * d * m  # in_proj, conv, out_proj, gated MLP
    assert backbone.work_without_attention == {0: convolution, 2: convolution, 5: convolution}


def test_the_work_of_recurrent_layers_counts_their_state_and_the_experts_in_use() -> None:
    model = llava_nemotron_h().build()
    backbone = backbone_for(model)
    layers = backbone.text.layers
    mamba = sum(w.numel() for n, w in layers[0].named_parameters() if w.dim() == 2 or "conv" in n)
    assert backbone.work_without_attention[0] == mamba + 4 * 4 * 8 * 8
    experts = sum(w.numel() for w in layers[2].parameters() if w.dim() == 3)
    dense = sum(w.numel() for w in layers[2].parameters() if w.dim() == 2)
    assert backbone.work_without_attention[2] == dense + experts * 2 // 4
    assert flops.without_attention(layers[5], backbone.text.config) == sum(
        w.numel() for w in layers[5].parameters() if w.dim() == 2
    )
