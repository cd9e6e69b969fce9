"""DyCoke's temporal part: recorded choices, which frames are thinned, and what the published code got wrong."""

from __future__ import annotations

import pytest
import torch
from llm_goldens import stage_of
from video_goldens import golden, kept

from dropflow_dycoke import Temporal


def drawn(frames: int, rows: int = 10) -> torch.Tensor:
    return torch.randn(frames, rows, 8, generator=torch.Generator().manual_seed(frames))


@pytest.mark.parametrize("case", ["dycoke_5", "dycoke_8", "dycoke_9_odd"])
def test_recorded_choices_and_the_last_odd_frame_that_the_released_code_loses(case: str) -> None:
    found = golden(case)
    frames = found["features"]
    (got,) = kept(stage_of(Temporal, drop=found["params"]["drop"]), frames)
    expected = set(found["index"].tolist())
    if len(frames) % 2:
        lost = range(frames.shape[1] * (len(frames) - 1), frames.shape[1] * len(frames))
        assert not expected & set(lost)
        expected |= set(lost)
    assert set(got.tolist()) == expected


@pytest.mark.parametrize(
    ("frames", "whole", "last_group"),
    [
        (1, [0], [0]),
        (2, [0], [0]),
        (3, [0, 2], [0]),
        (4, [0, 2], [0]),
        (5, [0, 4], [0, 4]),
        (6, [0, 4], [0, 4]),
        (7, [0, 4, 6], [0, 4]),
        (8, [0, 4, 6], [0, 4]),
    ],
)
def test_which_frames_stay_whole(frames: int, whole: list[int], last_group: list[int]) -> None:
    for option, expected in ((False, whole), (True, last_group)):
        (got,) = kept(stage_of(Temporal, drop=0.7, last_group=option), drawn(frames))
        sizes = torch.bincount(got // 10, minlength=frames).tolist()
        assert sizes == [10 if frame in expected else 3 for frame in range(frames)]


def test_the_published_count_on_llava_onevision() -> None:
    frames = torch.randn(32, 196, 4, generator=torch.Generator().manual_seed(0))
    assert len(kept(stage_of(Temporal), frames)[0]) == 3098


def test_equal_frames_tie_so_that_the_first_places_stay() -> None:
    frame = torch.randn(1, 10, 512, generator=torch.Generator().manual_seed(0))
    (got,) = kept(stage_of(Temporal, drop=0.8), frame.expand(2, -1, -1).clone())
    assert got.tolist() == [*range(10), 10]  # int(0.19999999999999996 * 10) is 1
