"""The video benchmark: every shipped stage for videos or on pixels, on prompts that are what they are said to be."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import distribution
from math import prod

import pytest
import torch

import dropflow
from dropflow_lab.bench.random_qwen import QwenShape, build_page_prompt, build_qwen, build_video_prompt
from dropflow_lab.bench.stages import POLICIES
from dropflow_lab.bench.video import PAGE, PIXEL_POLICIES, VIDEO_POLICIES, VideoBench, bench_video

TOY = replace(QwenShape(), hidden=64, intermediate=96, heads=2, vocabulary=64, side=4, text_tokens=8)
TOY_PAGE = replace(
    PAGE, hidden=64, intermediate=96, heads=2, vocabulary=64, side=8, text_tokens=8, vision_hidden=64, vision_layers=4
)


@pytest.fixture(scope="module")
def measured() -> VideoBench:
    return bench_video(TOY, replace(TOY_PAGE, full_attention=(3,)), rounds=2)


def test_every_shipped_stage_is_measured_somewhere(measured: VideoBench) -> None:
    """But for those that need training, and those that select nothing in the prefill (`dropflow bench decode`)."""
    shipped = {
        point.name: point.load() for point in distribution("dropflow").entry_points.select(group="dropflow.stages")
    }
    own = {row.stage for row in (*measured.rows, *measured.encoder)}
    other = {str(stages["measured"]["use"]) for stages in POLICIES.values()}
    assert own | other == {
        name for name, kind in shipped.items() if not kind.needs_training and "decode_reads_at" not in vars(kind)
    }
    assert [row.policy for row in measured.rows] == list(VIDEO_POLICIES)
    assert [row.policy for row in measured.encoder] == list(PIXEL_POLICIES)


def test_policies_leave_what_they_are_named_after(measured: VideoBench) -> None:
    rows = {row.policy: row for row in measured.rows}
    assert rows["EVS at 25 %"].entry_share == rows["every fourth time step"].entry_share == 0.25
    assert rows["VidCom2 at 25 %"].entry_share == pytest.approx(0.25, abs=0.03)
    assert rows["EVS at 25 %"].flops_ratio == rows["every fourth time step"].flops_ratio > 1.5
    assert measured.shorter.flops_ratio > rows["EVS at 25 %"].flops_ratio, "its tower runs on fewer frames, too"
    assert rows["FlashVID at 25 %, late"].flops_ratio == rows["FlashVID at 25 %, merging"].flops_ratio
    square = (TOY.visual_tokens + TOY.text_tokens + 2) ** 2
    assert all(row.largest_tensor < square for row in measured.rows)


def test_the_tower_runs_on_fewer_units_of_a_page(measured: VideoBench) -> None:
    rows = {row.policy: row for row in measured.encoder}
    # two written columns of eight, a white one whose left neighbour does not predict it, and none else
    assert rows["PixelPrune"].kept_share == 3 / 8
    assert rows["PixelPrune's baseline"].kept_share == (2 * 8 + 1) / 64
    assert rows["PixelPrune"].flops_ratio > 2


def test_a_quarter_of_the_places_changes_from_step_to_step() -> None:
    inputs = build_video_prompt(replace(TOY, side=20))
    pixels = inputs["pixel_values_videos"].view(8, 400, 4, -1)
    same = (pixels[1:] == pixels[:-1]).flatten(2).all(-1)
    assert (~same).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert prod(inputs["video_grid_thw"][0].tolist()) == len(inputs["pixel_values_videos"])


def test_prompts_are_those_of_the_model() -> None:
    keep_all = {"name": "keep", "stages": {"keep": {"use": "control/keep-all"}}}
    for shape, inputs in ((TOY, build_video_prompt(TOY)), (TOY_PAGE, build_page_prompt(TOY_PAGE, 0.5))):
        model = build_qwen(shape)
        with (
            torch.no_grad(),
            dropflow.attach(model, keep_all) as flow,
        ):
            model(**inputs)
        assert flow.report().entry_visual_tokens == shape.visual_tokens
