"""EVS: the published masks, what they promise, and what the published code got wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llm_goldens import stage_of
from method_goldens import FEW
from video_goldens import encode_call, golden, goldens, kept

from dropflow.errors import DecisionError
from dropflow_evs import Retention
from dropflow_evs.change import change, most_changed, retained


def drawn(seed: int, frames: int = 5, rows: int = 6, dim: int = 8) -> torch.Tensor:
    return torch.randn(frames, rows, dim, generator=torch.Generator().manual_seed(seed))


def recorded(case: str) -> tuple[torch.Tensor, float, torch.Tensor]:
    found = golden(case)
    time, height, width = found["thw"].tolist()
    frames = found["features"].view(time, height * width // found["merge"] ** 2, -1)
    return frames, found["q"], found["mask"].bool().nonzero()[:, 0]


@pytest.mark.parametrize("case", goldens("evs"))
def test_recorded_masks(case: str) -> None:
    frames, rate, expected = recorded(case)
    assert torch.equal(kept(stage_of(Retention, rate=rate), frames)[0], expected)


@pytest.mark.parametrize("order", [("evs_01", "evs_11"), ("evs_11", "evs_01")])
def test_two_videos_of_a_call_come_out_as_each_alone(order: tuple[str, str]) -> None:
    videos = [recorded(case)[0] for case in order]
    stage = stage_of(Retention, rate=0.7)
    assert len(videos[0]) != len(videos[1])
    for together, video in zip(kept(stage, *videos), videos, strict=True):
        assert torch.equal(together, kept(stage, video)[0])


def test_the_second_video_is_not_compared_with_the_first_as_in_the_published_code() -> None:
    found = golden("evs_two_videos")
    videos = [found[name].view(3, 9, -1) for name in ("features_a", "features_b")]
    for got, name in zip(kept(stage_of(Retention, rate=found["q"]), *videos), ("mask_a", "mask_b"), strict=True):
        assert torch.equal(got, found[name].bool().nonzero()[:, 0])
    assert not torch.equal(torch.cat((found["mask_a"], found["mask_b"])), found["mask_joint"])


def test_the_recorded_table_of_counts() -> None:
    table = golden("evs_counts")["table"]
    assert len(table) == 240
    for rows, frames, rate, count in table.tolist():
        assert retained(int(frames), int(rows), rate) == count
    assert retained(10, 10, 0.9) == 10  # 9.99... is cut to 9, fewer than one frame
    assert retained(20, 10, 0.9) == 19


def test_equal_frames_tie_so_that_the_earlier_ones_stay() -> None:
    frame = torch.randn(1, 4, 512, generator=torch.Generator().manual_seed(3))
    (got,) = kept(stage_of(Retention, rate=0.6), frame.expand(6, -1, -1).clone())
    assert got.tolist() == list(range(9))  # 24 * 0.4 = 9.6


def test_a_cut_takes_a_whole_frame_and_a_frame_may_keep_nothing() -> None:
    scenes = drawn(0, 2, 4)
    frames = scenes[[0, 0, 0, 1, 1]]
    (got,) = kept(stage_of(Retention, rate=0.6), frames)
    assert got.tolist() == [0, 1, 2, 3, 12, 13, 14, 15]


@pytest.mark.parametrize(("frames", "rate"), [(1, 0.7), (3, 0.9)])
def test_the_first_frame_stays_whole(frames: int, rate: float) -> None:
    (got,) = kept(stage_of(Retention, rate=rate), drawn(1, frames))
    assert got.tolist() == list(range(6))


@FEW
@given(st.integers(0, 10**6), st.integers(6, 30))
def test_invariants(seed: int, count: int) -> None:
    frames = drawn(seed)
    keep = most_changed(change(frames), count)
    dice = torch.Generator().manual_seed(seed + 1)
    assert int(keep.sum()) == count
    assert keep[0].all()
    assert not (keep & ~most_changed(change(frames), min(count + 1, 30))).any()
    lengths = 0.5 + torch.rand(5, 6, 1, generator=dice)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=dice))[0]
    places = torch.randperm(6, generator=dice)
    assert torch.equal(most_changed(change(frames * lengths), count), keep)
    assert torch.equal(most_changed(change(frames @ rotation), count), keep)
    assert torch.equal(most_changed(change(frames[:, places]), count), keep[:, places])
    assert torch.equal(change(frames[:3]), change(frames)[:3])


def test_scores_are_told_to_observers_and_pictures_have_none() -> None:
    frames = drawn(2, 3)
    call = encode_call(frames, videos=((0, 2),))
    answer = stage_of(Retention, rate=0.5).encode(call)
    assert answer.keep[1].all()
    first, picture, second = answer.scores()
    assert first.tolist() == [255.0] * 6
    assert picture.isnan().all()
    expected = 1 - torch.nn.functional.cosine_similarity(frames[0], frames[2], dim=-1)
    assert torch.allclose(second, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        (((2, 3), (3, 2)), r"^compares .* grids \['\(2, 3\)', '\(3, 2\)'\] and \[6\] rows; give the fr"),
        (((2, 4), (2, 4)), r"^compares .* an earlier stage has left 6 of 8; let this stage come first"),
    ],
)
def test_frames_that_cannot_be_compared_by_place_are_refused(grids: Any, message: str) -> None:
    with pytest.raises(DecisionError, match=message):
        stage_of(Retention).encode(encode_call(drawn(0, 2), grids=grids))
