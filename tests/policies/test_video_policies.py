"""Policies of the video methods run on the families they were published for, keep what they say, and equal oracles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import dropflow
from dropflow.testing import VIDEO, Tiny, tiny_models
from dropflow.testing.case import Case
from dropflow.testing.guarantees import check_prefill

SAMPLES = ((3, "V", 5), (1, "I", 2, "V", 6), (4,))


def deep(family: str, layers: int) -> Tiny:
    """The family in miniature with as many decoder layers as the published model."""
    tiny = tiny_models()[family][1]

    def build() -> Any:
        model = tiny.build()
        config = model.config
        config.text_config.num_hidden_layers = layers
        if getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = [config.text_config.layer_types[0]] * layers
        return type(model)(config)

    return replace(tiny, build=build)


POLICIES = {
    # family, tokens left of each video of 3 frames of 4 tokens, or of 2 of 6
    "evs-70": ("qwen2_5_vl", 6, 6),
    "vidcom2-25": ("llava_onevision", 3, 4),
    "vidcom2-qwen-25": ("qwen2_5_vl", 2, 4),
    "dycoke-70": ("llava_onevision", 4 + 1 + 4, 9),
    "flashvid-25": ("llava_onevision", 3 * 2, 3 * 2),  # ceil(4 * 0.25 * 1.25) of every frame, all selected
    "flashvid-10": ("llava_onevision", 3 * 1, 3 * 1),
    "flashvid-qwen2.5-25": ("qwen2_5_vl", 2 * 2, 2 * 2),
    "flashvid-qwen3-25": ("qwen3_vl", 2 * 2, 2 * 2),
    "holitom-10": ("llava_onevision", 1, 5),
    "holitom-15": ("llava_onevision", 1, 5),
    "holitom-20": ("llava_onevision", 1, 6),
    "holitom-25": ("llava_onevision", 1, 6),
}


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_a_policy_keeps_what_it_says_and_equals_the_masked_run(name: str) -> None:
    family, least, most = POLICIES[name]
    tuned = dropflow.load_policy(name).tuned_for
    assert tuned is not None
    adapter, tiny = tiny_models()[family][0], deep(family, tuned.layers)
    text = dropflow.load_policy(name).to_dict()
    case = Case(name, adapter, tiny, text, samples=SAMPLES)
    with case.attach() as flow:
        case.model(**case.inputs)
        live = flow.live()[0]
    patches = (case.inputs["input_ids"] == VIDEO) & live
    newline = int(family == "llava_onevision")
    for kept in patches.sum(1).tolist()[:2]:
        assert least <= kept - newline <= most
    pictures = (case.inputs["input_ids"] != VIDEO) & case.real
    assert live[pictures].all()
    if text["positions"] == "persistent":  # the oracle masks, and so numbers all tokens
        assert check_prefill(case) < 1e-5
