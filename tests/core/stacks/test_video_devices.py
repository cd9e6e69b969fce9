"""Stages for videos on a model whose tower and decoder lie on two devices give what they give on one."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from packaging.version import Version
from seven import outcome
from tiny import policy
from two_devices import HOST, SECOND, TwoDevices, spread

from dropflow.testing import tiny_models

STAGES: dict[str, dict[str, Any]] = {
    "evs": {"use": "evs/retention", "rate": 0.4},
    "vidcom2": {"use": "vidcom2/frame-compensation", "retention": 0.3, "exact_count": True},
    "dycoke": {"use": "dycoke/temporal", "drop": 0.6},
    "flashvid": {"use": "flashvid/tree-merging", "retention": 0.4, "fewest_segments": 1, "segment_threshold": -1.0}
    | {"merge_threshold": 0.0},
    "flashvid in the LLM": {"use": "flashvid/late-rank", "at": 4, "keep": 0.4},
    "holitom": {"use": "holitom/merging", "retention": 0.4, "threshold": 0.0},
    "holitom in the LLM": {"use": "holitom/folding", "at": 3, "keep": 0.4},
    "frames": {"use": "control/frames", "keep": 0.5},
    "random": {"use": "control/random", "encode": 0.4, "per": "video"},
    "stride": {"use": "control/stride", "encode": 0.4, "per": "video"},
}
PARTS = ["model.visual", "model.language_model", "lm_head"]


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="older models cannot have their tower elsewhere"
)
@pytest.mark.parametrize("there", [["model.visual"], PARTS[1:]], ids=["tower", "decoder"])
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_tower_and_a_decoder_on_two_devices(stage: dict[str, Any], there: list[str]) -> None:
    tiny = tiny_models()["qwen2_5_vl"][1]
    inputs, _ = tiny.prompt(((3, "V", 5), (1, "I", 2, "V", 6)), side="left")
    split = spread(tiny.model(), {part: SECOND if part in there else HOST for part in PARTS})
    which = policy(stage=stage)
    with TwoDevices():
        found = outcome(split, which, inputs)
    assert found.differences(outcome(tiny.model(), which, inputs)) == []
