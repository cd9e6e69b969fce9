"""The controls on videos: budgets of whole videos, tokens at even distances in time, and uniform frame sampling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llm_goldens import stage_of
from method_goldens import FEW
from video_goldens import encode_call, kept

import dropflow
from dropflow.backbone.image_layout import ImageLayout
from dropflow.errors import DecisionError, PolicyError
from dropflow.testing import tiny_models
from dropflow.testing.families.qwen2_vl import packed
from dropflow.testing.families.tiny import END, IMAGE, START, VIDEO, Picture
from dropflow_control import Frames, RandomSubset, Stride
from dropflow_control.spacing import divided


def drawn(seed: int, frames: int = 5, rows: int = 6) -> torch.Tensor:
    return torch.randn(frames, rows, 8, generator=torch.Generator().manual_seed(seed))


def sizes(got: torch.Tensor, frames: int = 5, rows: int = 6) -> list[int]:
    return torch.bincount(got // rows, minlength=frames).tolist()


@pytest.mark.parametrize("kind", [RandomSubset, Stride])
@pytest.mark.parametrize(("budget", "count"), [(0.5, 15), (7, 7), (2, 2), (1.0, 30), (0, 0), (99, 30)])
def test_a_budget_of_a_video_is_kept_to_the_token(kind: Any, budget: int | float, count: int) -> None:
    videos = [drawn(0), drawn(1)]
    stage = stage_of(kind, visual_tokens=None, encode=budget, per="video")
    together = kept(stage, *videos)
    for got, video in zip(together, videos, strict=True):
        assert len(got) == count
        assert torch.equal(got, kept(stage, video)[0])


def test_random_tokens_are_drawn_over_the_whole_video_and_even_ones_frame_by_frame() -> None:
    even, random = stage_of(Stride, encode=0.4, per="video"), stage_of(RandomSubset, encode=0.4, per="video")
    assert [sizes(kept(even, drawn(seed))[0]) for seed in range(3)] == [[2, 2, 3, 2, 3]] * 3
    drawn_sizes = [sizes(kept(random, drawn(seed))[0]) for seed in range(20)]
    assert {size for own in drawn_sizes for size in own} >= {0, 1, 2, 3, 4}
    other = stage_of(RandomSubset, encode=0.4, per="video", seed=1)
    assert not torch.equal(kept(random, drawn(0))[0], kept(other, drawn(0))[0])
    two = stage_of(Stride, encode=2, per="video")
    assert sizes(kept(two, drawn(0))[0]) == [0, 0, 1, 0, 1]


def test_even_tokens_are_spread_over_the_grid_of_each_frame() -> None:
    call = encode_call(drawn(0, 2, 16), grids=((4, 4),) * 2)
    keep = stage_of(Stride, encode=0.25, per="video").encode(call).keep
    for own in keep:
        rows, columns = own.view(4, 4).nonzero().T
        assert rows.diff().tolist() == [0, 2, 0]
        assert columns.diff().tolist() == [2, -2, 2]


def test_pictures_stay_whole_beside_a_video() -> None:
    call = encode_call(drawn(0), videos=((0, 3),))
    for stage in (
        stage_of(RandomSubset, encode=0.25, per="video"),
        stage_of(Stride, encode=0.25, per="video"),
        stage_of(Frames, keep=0.25),
    ):
        keep = stage.encode(call).keep
        assert [int(own.sum()) for own in keep][1::3] == [6, 6]
        assert keep[2].all()
        assert int(keep[0].sum() + keep[3].sum()) == 3


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (0.4, [0, 6, 0, 6, 0]),
        (18, [6, 0, 6, 0, 6]),
        (14, [6, 0, 6, 0, 2]),
        (3, [0, 0, 3, 0, 0]),
        (30, [6] * 5),
        (0, [0] * 5),
    ],
)
def test_whole_frames_at_even_distances(keep: int | float, expected: list[int]) -> None:
    (got,) = kept(stage_of(Frames, visual_tokens=None, keep=keep), drawn(0))
    assert sizes(got) == expected


@FEW
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.floats(0, 1))
def test_things_are_divided_evenly(groups: list[int], share: float) -> None:
    count = int(share * sum(groups))
    parts = divided(count, groups)
    assert sum(parts) == count
    assert all(0 <= part <= size for part, size in zip(parts, groups, strict=True))


def test_frames_of_two_sizes_are_no_uniform_sample() -> None:
    call = encode_call(drawn(0, 2), grids=((2, 3), (3, 2)))
    with pytest.raises(DecisionError, match=r"grids \['\(2, 3\)', '\(3, 2\)'\]"):
        stage_of(Frames, keep=0.5).encode(call)


def test_a_budget_per_video_inside_the_llm_is_refused() -> None:
    stage = {"use": "control/random", "keep": {2: 0.5}, "per": "video"}
    with pytest.raises(PolicyError, match=r"`per` says what `encode` counts for, which is missing"):
        dropflow.load_policy({"name": "x", "stages": {"a": stage}})


@pytest.mark.parametrize("place", ["output", "pixels", 1])
@torch.no_grad()
def test_videos_of_different_length_on_qwen(place: str | int) -> None:
    tiny = tiny_models()["qwen2_5_vl"][1]

    def video(number: int, dice: torch.Generator) -> Picture:
        times = (4, 1, 0, 3)[number]
        ids = [START, *[VIDEO] * (6 * times), END]
        return Picture(ids, packed("video", times, 4, 6, dice), [ImageLayout(6, (2, 3))] * times)

    tiny = replace(tiny, pictures={**tiny.pictures, "video": video})
    model, inputs = tiny.model(), tiny.prompt([(3, "V", 5), (1, "V", 2, "I", 2, "V", 6)])[0]
    for use in ("control/random", "control/stride"):
        stage = {"use": use, "encode": 0.5, "per": "video", "place": place}
        with dropflow.attach(model, {"name": "x", "stages": {"a": stage}}) as flow:
            model(**inputs)
            live = flow.live()[0]
        ids = inputs["input_ids"]
        assert (live & (ids == VIDEO)).sum(1).tolist() == [12, 3 + 9]
        assert (live & (ids == IMAGE)).sum(1).tolist() == (ids == IMAGE).sum(1).tolist() == [0, 8]
