"""Schedules and FLOPs of the papers, from a policy's forecast alone."""

from __future__ import annotations

import pytest

from dropflow import Forecast, Keep, Stage, StageOptions, hookimpl, load_policy
from dropflow.backbone.flops import LLAVA_7B
from dropflow.errors import PolicyError
from dropflow.units import BackboneShape
from dropflow_lab.explain.forecast import Explanation, explain

LLAVA = BackboneShape(layers=32, visual_tokens=576)
PYRAMID_DROP = {
    "name": "pyramid-drop",
    "stages": {"pyramid": {"use": "hidrop/concave-pyramid", "keep": {8: 288, 16: 144, 24: 72}}},
}


def _explain(policy: object) -> Explanation:
    return explain(load_policy(policy), LLAVA, LLAVA_7B, text_tokens=64)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "average", "flops"),
    [
        ("hidrop-48", 48.0, 0.3165e12),
        ("hidrop-64", 64.0, 0.42141696e12),
        ("hidrop-80", 2561 / 32, 0.5288e12),
        (PYRAMID_DROP, 270.0, 1.7774e12),
    ],
)
def test_published_averages_and_flops(policy, average, flops) -> None:
    explanation = _explain(policy)
    assert explanation.average_visual_tokens == average
    assert explanation.entry_visual_tokens == 576
    assert explanation.flops == pytest.approx(flops, abs=0.5e8)  # four digits are published
    assert explanation.flops_dense == pytest.approx(3.8172e12, abs=0.5e8)


def test_layers_of_hidrop_64() -> None:
    layers = _explain("hidrop-64").layers
    counts = [0] * 8 + [576] * 2 + [215] * 4 + [10] * 2 + [5] * 2 + [1] * 6 + [0] * 8
    assert [layer.visual_tokens for layer in layers] == counts
    assert [layer.kv_entries for layer in layers] == [count + 64 for count in counts]
    d, m, n = 4096, 11008, 215
    assert layers[10].flops == 4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m


class UntilTheDataSaysSo(Stage[StageOptions]):
    """Drops some tokens at boundary 2; how many depends on the image."""

    prune_at = (2,)

    def forecast(self) -> Forecast:
        return Forecast(keeps={2: None})

    @hookimpl
    def prune(self, call) -> Keep:
        return Keep(call.hidden.norm(dim=-1) > 1)


def test_what_the_data_decides_is_none() -> None:
    policy = load_policy({"name": "data", "stages": {"adaptive": {"use": UntilTheDataSaysSo}}})
    explanation = explain(policy, BackboneShape(4, 100), LLAVA_7B, text_tokens=10)
    assert [layer.visual_tokens for layer in explanation.layers] == [100, 100, None, None]
    assert [layer.kv_entries for layer in explanation.layers] == [110, 110, None, None]
    assert (explanation.layers[2].flops, explanation.flops, explanation.average_visual_tokens) == (None, None, None)


def test_a_hybrid_holds_entries_and_ranks_only_where_it_has_attention() -> None:
    hybrid = BackboneShape(layers=8, visual_tokens=100, attending=(3, 7))
    pyramid = {"use": "pyramiddrop/pyramid", "keep": {4: 0.5, 7: 0.2}}
    found = explain(load_policy({"name": "p", "stages": {"p": pyramid}}), hybrid, LLAVA_7B, text_tokens=10)
    assert [layer.kv_entries for layer in found.layers] == [0, 0, 0, 110, 0, 0, 0, 30]
    assert found.ranked_by == {4: 3}
    early = {"name": "p", "stages": {"p": {"use": "pyramiddrop/pyramid", "keep": {2: 0.5}}}}
    with pytest.raises(PolicyError, match=r"stages\.p: at boundary 2 it ranks by .* rank at boundary 3 or later"):
        explain(load_policy(early), hybrid, LLAVA_7B, text_tokens=10)


@pytest.mark.parametrize(
    ("stages", "tower", "entry"),
    [
        ({"s": {"use": "control/stride", "encode": 144}}, 576, 144),
        ({"s": {"use": "control/stride", "encode": 144, "place": "pixels"}}, 144, 144),
        (
            {
                "later": {"use": "control/random", "encode": 0.5},
                "first": {"use": "control/stride", "encode": 288, "place": "pixels"},
            },
            288,
            144,
        ),
    ],
)
def test_what_enters_the_tower_is_told_apart_from_what_enters_the_llm(stages, tower, entry) -> None:
    explanation = _explain({"name": "pixels", "stages": stages})
    assert (explanation.tower_visual_tokens, explanation.entry_visual_tokens) == (tower, entry)
