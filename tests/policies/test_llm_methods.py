"""Policies of the methods that prune inside the LLM: tokens and FLOPs as published, or as their code gives them."""

from __future__ import annotations

import pytest

import dropflow
from dropflow.backbone.flops import LLAVA_7B, vision_only
from dropflow.policy.plan import resolve
from dropflow.units import BackboneShape

SEGMENTS = {
    "fastv-k2-r25": [(576, 2), (432, 30)],
    "fastv-k2-r50": [(576, 2), (288, 30)],
    "fastv-k2-r75": [(576, 2), (144, 30)],
    "fastv-k2-r87.5": [(576, 2), (72, 30)],
    "fastv-k3-r50": [(576, 3), (288, 29)],
    "fastv-k3-r75": [(576, 3), (144, 29)],
    "pyramiddrop": [(576, 8), (288, 8), (144, 8), (72, 8)],
    "pyramiddrop-13b": [(576, 8), (288, 8), (144, 8), (72, 16)],
    "sparsevlm-192": [(576, 3), (309, 4), (204, 9), (113, 16)],
    "sparsevlm-128": [(576, 3), (312, 4), (117, 9), (39, 16)],
    "sparsevlm-96": [(576, 3), (249, 4), (55, 9), (27, 16)],
    "sparsevlm-64": [(576, 3), (82, 4), (32, 9), (18, 16)],
    "sparsevlm-plus-192": [(576, 3), (300, 4), (200, 9), (118, 16)],
    "sparsevlm-plus-128": [(576, 3), (238, 4), (108, 9), (60, 16)],
    "sparsevlm-plus-96": [(576, 3), (246, 4), (54, 9), (28, 16)],
    "sparsevlm-plus-64": [(576, 3), (66, 4), (34, 9), (20, 16)],
    "vtw-15": [(576, 15), (0, 17)],
    "vtw-16": [(576, 16), (0, 16)],
    "vtw-13b": [(576, 20), (0, 20)],
}
AVERAGES = {
    "fastv-k2-r25": 441,
    "fastv-k2-r50": 306,
    "fastv-k2-r75": 171,
    "fastv-k2-r87.5": 103.5,
    "fastv-k3-r50": 315,
    "fastv-k3-r75": 184.5,
    "pyramiddrop": 270,
    "pyramiddrop-13b": 230.4,
    "sparsevlm-192": 206.5,
    "sparsevlm-128": 145.40625,
    "sparsevlm-96": 114.09375,
    "sparsevlm-64": 82.25,
    "sparsevlm-plus-192": 206.75,
    "sparsevlm-plus-128": 144.125,
    "sparsevlm-plus-96": 113.9375,
    "sparsevlm-plus-64": 81.8125,
    "vtw-15": 270,
    "vtw-16": 288,
    "vtw-13b": 288,
}


def per_layer(name: str) -> list[int]:
    policy = dropflow.load_policy(name)
    assert policy.tuned_for is not None
    return [n or 0 for n in resolve(policy, BackboneShape(policy.tuned_for.layers, 576)).schedule().per_layer]


@pytest.mark.parametrize("name", SEGMENTS)
def test_tokens_in_front_of_every_layer_and_their_average(name: str) -> None:
    tokens = per_layer(name)
    assert tokens == [count for count, layers in SEGMENTS[name] for _ in range(layers)]
    assert sum(tokens) / len(tokens) == AVERAGES[name]


EQUAL_TOKENS = {
    "sparsevlm-192": 192.03,
    "sparsevlm-128": 128.63,
    "sparsevlm-96": 96.94,
    "sparsevlm-64": 64.81,
    "sparsevlm-plus-192": 192.44,
    "sparsevlm-plus-128": 128.00,
    "sparsevlm-plus-96": 96.81,
    "sparsevlm-plus-64": 64.44,
}
"""What the released code prints: tokens of each layer counted after its own cut."""


@pytest.mark.parametrize("name", EQUAL_TOKENS)
def test_equal_tokens_are_those_that_the_released_code_prints(name: str) -> None:
    tokens = per_layer(name)
    assert sum([*tokens[1:], tokens[-1]]) / 32 == pytest.approx(EQUAL_TOKENS[name], abs=0.005)


@pytest.mark.parametrize(
    ("name", "scale", "bias"),
    [("sparsevlm-rank-192", 13.5, 0), ("sparsevlm-rank-128", 9.0, 6), ("sparsevlm-rank-64", 0.8, 0)],
)
def test_adaptive_numbers_are_left_to_the_data(name: str, scale: float, bias: float) -> None:
    plan = resolve(dropflow.load_policy(name), BackboneShape(32, 576))
    rank = plan.stages[0][1].options.rank
    assert (rank.scale, rank.bias) == (scale, bias)
    assert tuple(plan.prune_at) == (3, 7, 16, 20)
    assert plan.schedule().per_layer == (576,) * 3 + (None,) * 29


def test_images_of_llava_next_are_halved_by_their_own_size() -> None:
    plan = resolve(dropflow.load_policy("pyramiddrop"), BackboneShape(32, None))
    assert plan.schedule(2880).per_layer == tuple(n for n in (2880, 1440, 720, 360) for _ in range(8))
    assert plan.schedule(575).per_layer == tuple(n for n in (575, 287, 143, 71) for _ in range(8))


def fastv_layer(n: int, d: int = 4096, m: int = 11008) -> int:
    """FastV's own formula, which counts two matrices of the MLP."""
    return 4 * n * d * d + 2 * n * n * d + 2 * n * d * m


def test_flops_are_the_published_shares() -> None:
    dense = 32 * vision_only(576, LLAVA_7B)
    # PyramidDrop: 1.78 of 3.82 TFLOPs
    assert sum(vision_only(n, LLAVA_7B) for n in per_layer("pyramiddrop")) == pytest.approx(1.78e12, abs=0.005e12)
    assert dense == pytest.approx(3.82e12, abs=0.005e12)
    # FastV: 57 % for K = 3 and R = 50 % with 44 tokens of text
    assert sum(fastv_layer(n + 44) for n in per_layer("fastv-k3-r50")) == pytest.approx(
        0.57 * 32 * fastv_layer(620), rel=5e-3
    )
    assert sum(fastv_layer(n) for n in per_layer("fastv-k2-r50")) == pytest.approx(
        0.524 * 32 * fastv_layer(576), rel=1e-3
    )
    # VTW: fewer than half for K = 15
    assert sum(vision_only(n, LLAVA_7B) for n in per_layer("vtw-15")) == pytest.approx(0.469 * dense, rel=1e-3)
