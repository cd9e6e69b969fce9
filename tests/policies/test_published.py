"""Shipped policies say what the papers say."""

from __future__ import annotations

import pytest

import dropflow
from dropflow.backbone.flops import LLAVA_7B, vision_only
from dropflow.policy import registry
from dropflow.policy.plan import resolve
from dropflow.units import BackboneShape

LLAVA = BackboneShape(32, 576)
PUBLISHED = {
    "hidrop-48": ([0] * 8 + [576] * 2 + [87] * 4 + [10] * 2 + [5] * 2 + [1] * 6 + [0] * 8, 0.3165e12),
    "hidrop-64": ([0] * 8 + [576] * 2 + [215] * 4 + [10] * 2 + [5] * 2 + [1] * 6 + [0] * 8, 0.4214e12),
    "hidrop-80": ([0] * 8 + [576] * 2 + [453] * 3 + [10] * 3 + [5] * 3 + [1] * 5 + [0] * 8, 0.5288e12),
    "hidrop-mobilellama-64": ([0] * 14 + [576] * 2 + [283] * 3 + [10] * 3 + [5] * 3 + [1] * 2 + [0] * 5, None),
}
SUMS = {"hidrop-48": 1536, "hidrop-64": 2048, "hidrop-80": 2561, "hidrop-mobilellama-64": 2048}


@pytest.mark.parametrize("name", PUBLISHED)
def test_schedule_and_flops_are_the_published_ones(name: str) -> None:
    per_layer, flops = PUBLISHED[name]
    schedule = resolve(dropflow.load_policy(name), LLAVA).schedule()
    assert list(schedule.per_layer) == per_layer
    assert sum(per_layer) == SUMS[name]
    assert schedule.average == SUMS[name] / 32
    if flops is not None:
        # the published figure has four digits
        assert sum(vision_only(n, LLAVA_7B) for n in per_layer) == pytest.approx(flops, abs=0.5e8)


def test_a_pyramid_written_by_hand() -> None:
    """PyramidDrop's 270 average tokens, from its own section of the papers' tables."""
    pyramid = {"use": "hidrop/concave-pyramid", "keep": {8: 288, 16: 144, 24: 72}}
    schedule = resolve(dropflow.load_policy({"name": "pdrop", "stages": {"p": pyramid}}), LLAVA).schedule()
    assert schedule.average == 270
    assert sum(vision_only(n or 0, LLAVA_7B) for n in schedule.per_layer) == pytest.approx(1.7774e12, rel=1e-4)
    assert 32 * vision_only(576, LLAVA_7B) == pytest.approx(3.8172e12, rel=1e-4)


@pytest.mark.parametrize("name", sorted(registry.policy_files()))
def test_every_shipped_policy_opens_with_what_it_is(name: str) -> None:
    text = registry.policy_files()[name].read_text(encoding="utf-8")
    head = text.splitlines()[:2]
    assert head[0].startswith("# ")
    assert f"dropflow run --policy {name}" in head[1]
    assert "override: --set stages." in head[1]
    policy = dropflow.load_policy(name)
    override = head[1].split("--set ")[1].split()[0]
    assert dropflow.load_policy(name, [override]) != policy, "the override in the head changes nothing"
    tuned = policy.tuned_for  # none where no number depends on the backbone
    resolve(policy, LLAVA if tuned is None else BackboneShape(tuned.layers, tuned.visual_tokens))
