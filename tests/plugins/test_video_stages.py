"""Every stage for videos on batches that real ones look like: lengths differ, frames repeat, a picture lies beside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import dropflow
from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing import END, IMAGE, START, VIDEO, Picture, Tiny, tiny_models
from dropflow.testing.case import Case
from dropflow.testing.families.qwen2_vl import packed
from dropflow.testing.guarantees import check_batch_invariance, check_prefill

STAGES: dict[str, dict[str, Any]] = {
    "evs": {"use": "evs/retention", "rate": 0.6},
    "vidcom2": {"use": "vidcom2/frame-compensation", "retention": 0.3},
    "vidcom2, exact": {"use": "vidcom2/frame-compensation", "retention": 0.3, "exact_count": True},
    "dycoke": {"use": "dycoke/temporal", "drop": 0.6},
    "flashvid": {"use": "flashvid/tree-merging", "retention": 0.4, "fewest_segments": 1, "merge_threshold": 0.2},
    "flashvid in the LLM": {"use": "flashvid/late-rank", "at": 4, "keep": 0.4},
    "holitom": {"use": "holitom/merging", "retention": 0.4, "threshold": 0.2},
    "holitom in the LLM": {"use": "holitom/folding", "at": 3, "keep": 0.4},
    "frames": {"use": "control/frames", "keep": 0.5},
    "random": {"use": "control/random", "encode": 0.4, "per": "video"},
    "stride": {"use": "control/stride", "encode": 0.4, "per": "video"},
}
SAMPLES = ((3, "V", 5), (1, "I", 2, "V", 6), (2, "V", 3, "V", 2), (4,))
SHAPES = {0: (5, 2, 3), 2: (1, 2, 3), 3: (3, 1, 1), 4: (4, 3, 2)}
"""Number of the picture in the batch -> time steps, rows and columns: one step, and one token per step, among them."""


def qwen(*, equal_steps: bool = False) -> Tiny:
    """Qwen2.5-VL whose videos have these shapes; with `equal_steps`, every step of a video shows the same."""
    tiny = tiny_models()["qwen2_5_vl"][1]

    def video(number: int, dice: torch.Generator) -> Picture:
        times, rows, columns = SHAPES[number]
        arguments = packed("video", times, 2 * rows, 2 * columns, dice)
        if equal_steps:
            step = arguments["pixel_values_videos"][: 4 * rows * columns]
            arguments["pixel_values_videos"] = step.repeat(times, 1)
        layouts = [ImageLayout(rows * columns, (rows, columns))] * times
        return Picture([START, *[VIDEO] * (rows * columns * times), END], arguments, layouts)

    return replace(tiny, pictures={**tiny.pictures, "video": video})


@pytest.mark.parametrize("equal_steps", [False, True], ids=["changing", "still"])
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
@torch.no_grad()
def test_batches_of_videos(stage: dict[str, Any], equal_steps: bool) -> None:
    family, tiny = tiny_models()["qwen2_5_vl"][0], qwen(equal_steps=equal_steps)
    case = Case("videos", family, tiny, {"name": "videos", "stages": {"stage": stage}}, samples=SAMPLES)
    assert check_prefill(case) < 1e-5
    if not equal_steps:  # the tower's rounding decides among equal tokens, and differs from batch to batch
        assert check_batch_invariance(case) < 1e-5
    with case.attach() as flow:
        case.model(**case.inputs)
        live, ids = flow.live()[-1], case.inputs["input_ids"]
    assert live[ids == IMAGE].all(), "a picture was reduced"
    left = (live & (ids == VIDEO)).sum(1).tolist()
    assert 0 < left[0] < 30
    assert left[1] > 0
    assert 0 < left[2] < 3 + 24


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
@torch.no_grad()
def test_llava_onevision_beside_a_picture(stage: dict[str, Any]) -> None:
    family, tiny = tiny_models()["llava_onevision"]
    samples = ((3, "V", 5), (1, "I", 2, "V", 6), (4,))
    case = Case("videos", family, tiny, {"name": "videos", "stages": {"stage": stage}}, samples=samples)
    assert check_prefill(case) < 1e-5
    with case.attach() as flow:
        case.model(**case.inputs)
        live, ids = flow.live()[-1], case.inputs["input_ids"]
    assert live[ids == IMAGE].all(), "a picture was reduced"
    assert all(0 < left < 13 for left in (live & (ids == VIDEO)).sum(1).tolist()[:2])


@torch.no_grad()
def test_a_stage_that_would_need_whole_frames_is_refused_after_one_that_drops_rows() -> None:
    tiny = qwen()
    model, inputs = tiny.model(), tiny.prompt(SAMPLES)[0]
    stages = {"random": {"use": "control/random", "encode": 0.5}, "evs": STAGES["evs"]}
    with (
        dropflow.attach(model, {"name": "x", "stages": stages}),
        pytest.raises(
            dropflow.errors.DecisionError,
            match=r"^stages\.evs: compares the rows .* has left 3 of 6; let this stage come",
        ),
    ):
        model(**inputs)
    with dropflow.attach(model, {"name": "x", "stages": dict(reversed(stages.items()))}):
        model(**inputs)


@torch.no_grad()
def test_the_newline_of_a_video_stays_where_its_last_frame_keeps_nothing() -> None:
    tiny = tiny_models()["llava_onevision"][1]
    model, inputs = tiny.model(), tiny.prompt(((3, "V", 5), (1, "V", 2)))[0]
    frames = inputs["pixel_values_videos"]
    frames[:] = frames[:, :1].clone()
    video = inputs["input_ids"] == VIDEO
    for stage in ({"use": "evs/retention", "rate": 0.99}, STAGES["holitom"] | {"threshold": 0.5}):
        with dropflow.attach(model, {"name": "x", "stages": {"stage": stage}}) as flow:
            model(**inputs)
            live = flow.live()[0]
        left = [own[here].int().tolist() for own, here in zip(live, video, strict=True)]
        assert left == [[1] * 4 + [0] * 8 + [1]] * 2
