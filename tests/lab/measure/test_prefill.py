"""Sums over prompts: without a policy they equal what the engine counts where a policy keeps everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dropflow
import dropflow.testing
from dropflow.backbone.backbone import backbone_for
from dropflow_lab.measure.prefill import Prefill, dense_flops

KEEPS_ALL = {"name": "all", "stages": {"all": {"use": "control/keep-all"}}}
TINY = dropflow.testing.tiny_models()
FAMILIES = [name for name in ("llava", "gemma3n", "qwen3_5", "lfm2_vl", "qwen2_vl") if name in TINY]
"""Layers of one kind; layers that share keys; layers with a recurrent state or a convolution; three-axis positions."""


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_policy_the_counts_are_those_of_one_that_keeps_everything(family: str) -> None:
    tiny = TINY[family][1]
    model = tiny.model()
    inputs = {"use_cache": True, **tiny.prompt([(3, "I", 5), (2, "I", 3)])[0]}
    backbone = backbone_for(model)
    dense = Prefill.of(backbone, None, inputs)
    with dropflow.attach(model, KEEPS_ALL) as flow:
        model(**inputs)
        kept, report = Prefill.of(backbone, flow, inputs), flow.report()
    assert kept.means() == pytest.approx(dense.means())
    assert (kept.prompts, kept.flops) == (2, pytest.approx(2 * report.flops_dense))
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert dense.flops == sum(dense_flops(backbone, length) for length in lengths)


@torch.no_grad()
def test_prompts_without_pictures_count_as_dense_and_not_as_the_last_prompt_with_some() -> None:
    tiny = TINY["llava"][1]
    model = tiny.model()
    pictured, _ = tiny.prompt([(3, "I", 5)])
    plain: dict[str, Any] = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.long),
    }
    policy = {"name": "half", "stages": {"drop": {"use": "control/random", "keep": {0: 0.5}}}}
    with dropflow.attach(model, policy) as flow:
        model(**pictured)
        half = Prefill.of(flow._hooks.backbone, flow, pictured)
        model(**plain)
        text = Prefill.of(flow._hooks.backbone, flow, plain)
    visual = int((pictured["input_ids"] == dropflow.testing.IMAGE).sum())
    assert (half.average_visual_tokens, half.prompts) == (visual / 2, 1)
    assert half.flops < half.flops_dense
    assert (text.average_visual_tokens, text.entry_visual_tokens, text.flops) == (0, 0, text.flops_dense)
    both = half + text
    assert both.means()["average_visual_tokens"] == visual / 4
    assert both.means()["flops"] == (half.flops + text.flops) / 2
    assert Prefill().means() == {}
