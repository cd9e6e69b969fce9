"""Vision methods run whole on families whose rows are pooled, packed or joined, and equal the masked run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

import dropflow
from dropflow.policy.plan import resolve
from dropflow.testing import Tiny, check_batch_invariance, check_drop_is_mask, tiny_models
from dropflow.testing.case import Case
from dropflow.testing.families.llava_next import anyres_image, small
from dropflow.units import BackboneShape

FAMILIES = (
    "gemma3",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "paligemma",
    "qwen2_5_vl",
    "qwen3_vl",
)
SEPARATE = {"llava", "paligemma"}
"""Families with the published places inside the tower and before the projector."""
MUSTDROP: dict[str, dict[str, Any]] = {
    "merge": {"use": "mustdrop/spatial-merge", "window": [2, 2], "budget": 0.5},
    "keys": {"use": "mustdrop/key-set", "share": 0.2},
    "filter": {"use": "mustdrop/dual-attention", "keep": {2: 0.7, 4: 0.4}},
    "cache": {"use": "mustdrop/output-aware-cache", "at": 2},
}


LIKES = ("aya_vision", "llava_next", "llava_onevision", "mistral3")
"""Families whose features are made like those of another one."""


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name in LIKES)) for name in FAMILIES]
)
def test_mustdrop_whole(family: str) -> None:
    adapter, tiny = tiny_models()[family]
    case = Case(f"mustdrop x {family}", adapter, tiny, {"name": "mustdrop", "stages": MUSTDROP})
    assert check_drop_is_mask(case) < 1e-5
    assert check_batch_invariance(case) < 1e-5
    with torch.no_grad(), case.attach() as flow:
        case.model(**case.inputs)
        prompt, merge = flow._last().prompt, dict(flow.plan.stages)["merge"]
    assert merge.encode_at == ((1,) if family in SEPARATE else (None,))
    patches, merged, protected = prompt.scored >= 0, prompt.present, prompt.protected
    assert 0 < int((merged & patches).sum()) < int(patches.sum()), "no window was merged"
    assert 0 < int(protected.sum()) < int((merged & patches).sum())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_visionzip_leaves_what_it_says(family: str) -> None:
    adapter, tiny = tiny_models()[family]
    stage = {"use": "visionzip/dominant-contextual", "dominant": 0.5, "contextual": 0.25}
    case = Case(f"visionzip x {family}", adapter, tiny, {"name": "zip", "stages": {"zip": stage}})
    with case.attach() as flow:
        case.model(**case.inputs)
        prompt, zipped = flow._last().prompt, dict(flow.plan.stages)["zip"]
    assert zipped.encode_at == (("features",) if family in SEPARATE else (None,))
    for image in range(int(prompt.scored.max()) + 1):
        own = prompt.scored == image
        size = int(own.sum())
        assert int((own & prompt.present).sum()) == int(size / 2 + 0.5) + int(size / 4 + 0.5)


@pytest.mark.parametrize(
    ("name", "entry", "average"),
    [
        ("visionzip-next-160", 160, 160),
        ("visionzip-next-320", 320, 320),
        ("visionzip-next-640", 640, 640),
        ("mustdrop-next-320", 1560, 320),
    ],
)
def test_policies_for_llava_next_leave_the_published_numbers(name: str, entry: int, average: int) -> None:
    policy = dropflow.load_policy(name)
    found = resolve(policy, BackboneShape(32, 2880)).schedule()
    assert found.entry == entry
    assert found.average == pytest.approx(average, abs=0.1)


@pytest.mark.parametrize("name", ["visionzip-next-640", "mustdrop-next-320"])
@torch.no_grad()
def test_policies_for_llava_next_run_on_images_of_any_size(name: str) -> None:
    def build() -> Any:
        options = small("clip_vision_model", "default")
        text = {**options["text_config"], "num_hidden_layers": 32}
        return LlavaNextForConditionalGeneration(LlavaNextConfig(**options | {"text_config": text}))

    tiny = Tiny(build, {"image": anyres_image})
    overrides = ["stages.merge.window=[2,2]"] if "mustdrop" in name else []
    model = tiny.model()
    with dropflow.attach(model, name, overrides=overrides) as flow:
        model(**tiny.prompt()[0])
        prompt = flow._last().prompt
    for image in range(int(prompt.scored.max()) + 1):
        own = prompt.scored == image
        size, left = int(own.sum()), int((own & prompt.present).sum())
        if "visionzip" in name:
            assert left == int(size * 0.1875 + 0.5) + max(1, int(size * 0.0347222 + 0.5))
        else:
            assert size * 0.54 <= left < size * 0.54 + 3
