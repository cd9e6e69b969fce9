"""VidCom2: the published scores, counts and choices, servers' exact counts, and what the published code got wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llm_goldens import stage_of
from method_goldens import FEW
from video_goldens import golden, goldens, kept

from dropflow_vidcom2 import FrameCompensation
from dropflow_vidcom2.uniqueness import Usual, counts, least


def drawn(seed: int, frames: int = 5, rows: int = 6, dim: int = 8) -> torch.Tensor:
    return torch.randn(frames, rows, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", goldens("vidcom2"))
def test_recorded_scores_counts_and_choices(case: str) -> None:
    found = golden(case)
    frames = found["features"]
    usual = Usual.of(frames)
    shares = usual.shares(found["retention"])
    for got, name in ((usual.video, "video_score"), (usual.frame, "frame_score"), (shares, "scales")):
        assert torch.allclose(got, found[name], rtol=0, atol=1e-5)
    assert torch.equal(counts(shares, frames.shape[1]), found["counts"].long())
    (got,) = kept(stage_of(FrameCompensation, retention=found["retention"]), frames)
    assert torch.equal(got, found["keep"].long().sort().values)


def test_patches_of_llava_video_stay_as_recorded_but_in_raster_order() -> None:
    found = golden("vidcom2_grid_01")
    (got,) = kept(stage_of(FrameCompensation, retention=found["retention"]), found["features"])
    assert torch.equal(got, found["keep"].long().sort().values)
    rows = found["rows_of_13x14"]
    assert not torch.equal(rows, rows.sort().values), "the recorded order has newlines after the patches of their frame"


@pytest.mark.parametrize("case", ["vidcom2_vllm_floor", "vidcom2_vllm_q75"])
def test_recorded_exact_counts_of_servers(case: str) -> None:
    found = golden(case)
    frames, rate = found["features"], found["params"]["q"]
    (got,) = kept(stage_of(FrameCompensation, retention=1 - rate, exact_count=True), frames)
    assert torch.equal(got, found["mask"].bool().nonzero()[:, 0])
    assert len(got) == max(len(frames), int(frames.shape[0] * frames.shape[1] * (1 - rate)))


def test_published_counts_are_only_near_and_exact_ones_exact() -> None:
    rounded, exact = (stage_of(FrameCompensation, retention=0.25, exact_count=exact) for exact in (False, True))
    off = []
    for frames in (4, 8, 32):
        video = drawn(0, frames, 49, 16)
        assert len(kept(exact, video)[0]) == frames * 49 // 4
        off.append(abs(len(kept(rounded, video)[0]) - frames * 49 / 4))
        assert off[-1] <= frames / 2
    assert max(off) >= 1
    assert len(kept(stage_of(FrameCompensation, retention=0.1, exact_count=True), drawn(0, 10, 10))[0]) == 10
    assert len(kept(stage_of(FrameCompensation, retention=0.1, exact_count=True), drawn(0, 10, 20))[0]) == 19


@pytest.mark.parametrize("order", [("vidcom2_01", "vidcom2_11"), ("vidcom2_11", "vidcom2_01")])
def test_two_videos_of_a_call_come_out_as_each_alone(order: tuple[str, str]) -> None:
    videos = [golden(case)["features"] for case in order]
    stage = stage_of(FrameCompensation)
    for together, video in zip(kept(stage, *videos), videos, strict=True):
        assert torch.equal(together, kept(stage, video)[0])


@FEW
@given(st.integers(0, 10**6), st.floats(0.02, 1))
def test_invariants(seed: int, retention: float) -> None:
    frames, dice = drawn(seed).double(), torch.Generator().manual_seed(seed)

    def chosen(video: torch.Tensor) -> torch.Tensor:
        usual = Usual.of(video)
        return least(usual.both, counts(usual.shares(retention), video.shape[1]))

    keep, order = chosen(frames), torch.randperm(5, generator=dice)
    assert (keep.sum(1) >= 1).all()
    assert torch.equal(chosen(frames * 4), keep)  # a power of two leaves no rounding
    assert torch.equal(chosen(frames[order]), keep[order])
    assert keep.all() or retention < 1


def test_equal_frames_keep_the_same_places() -> None:
    frames = drawn(4, 1, 9).expand(4, -1, -1).clone()
    (got,) = kept(stage_of(FrameCompensation, retention=0.4), frames)
    assert got.view(4, -1).remainder(9).unique(dim=0).shape == (1, 4)  # 3.6 of 9


def test_tokens_that_tie_are_kept_in_raster_order() -> None:
    (got,) = kept(stage_of(FrameCompensation, retention=0.4), torch.ones(2, 5, 4))
    assert got.tolist() == [0, 1, 5, 6]


def test_one_channel_is_left_where_half_of_them_are_none() -> None:
    (got,) = kept(stage_of(FrameCompensation, retention=0.5), torch.tensor([[[1.0], [1.0], [-1.0], [1.0]]]))
    assert got.tolist() == [0, 2]
