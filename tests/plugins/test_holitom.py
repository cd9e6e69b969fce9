"""HoliTom: recorded windows, rows and positions, what they promise, and what the published code got wrong."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llm_goldens import prune_call, stage_of
from method_goldens import FEW
from video_goldens import encode_call, golden, goldens

from dropflow import operators
from dropflow_holitom import Folding, Merging
from dropflow_holitom.blend import blend
from dropflow_holitom.windows import similarity, windows


def drawn(seed: int, frames: int = 5, rows: int = 8, dim: int = 6, step: float = 0.3) -> torch.Tensor:
    """Frames that change slowly."""
    dice = torch.Generator().manual_seed(seed)
    first = torch.randn(1, rows, dim, generator=dice)
    return first + step * torch.randn(frames, rows, dim, generator=dice).cumsum(0)


def recorded_rows(found: dict[str, Any]) -> torch.Tensor:
    """Without the newline rows, which the engine handles."""
    return found["out"][~(found["out"] == found["newline_row"]).all(1)]


@pytest.mark.parametrize("case", goldens("holitom_windows"))
def test_recorded_windows(case: str) -> None:
    found = golden(case)
    got, saved = windows(found["similarity"] > found["tau"], found["max_window"])
    assert got == [tuple(own) for own in found["windows"].tolist()]
    assert saved == found["reduced"]


def test_a_threshold_of_1_holds_no_place_still_even_where_frames_are_equal() -> None:
    frames = drawn(0, 1, 40, 64).repeat(6, 1, 1)
    assert (similarity(frames) > 0.999).all()
    assert windows(similarity(frames) > 1.0) == ([(frame, frame) for frame in range(6)], 0)


@pytest.mark.parametrize("case", goldens("holitom"))
def test_recorded_rows(case: str) -> None:
    found = golden(case)
    frames, expected = found["features"], recorded_rows(found)
    tiling, saved = windows(similarity(frames) > found["opt_tau"], found["opt_maxw"])
    assert (tiling, saved) == ([tuple(own) for own in found["windows"].tolist()], found["reduced"])
    settings = found["opt_r"], found["opt_tau"], found["opt_beta"]
    made = blend(frames, found["attention"], *settings, found["opt_maxw"])
    got = made.sums(frames).flatten(0, 1)[(made.counts(*frames.shape[:2]) > 0).flatten()]
    if found["opt_maxw"] == 1024:
        options = dict(zip(("retention", "threshold", "beta"), settings, strict=True))
        answer = stage_of(Merging, **options).encode(encode_call(frames, attention=(found["attention"],)))
        assert torch.equal(torch.cat(answer.rows), got)
        assert torch.allclose(torch.cat([own @ frames.flatten(0, 1) for own in answer.shares()]), got, atol=1e-5)
    assert len(got) == len(expected)
    if found["opt_newline"] == "grid":  # only then are the recorded rows in raster order
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    apart = (got[:, None] - expected).abs().amax(2)
    assert apart.amin(0).max() < 1e-5
    assert apart.amin(1).max() < 1e-5


@pytest.mark.parametrize("order", [("holitom_01", "holitom_05"), ("holitom_05", "holitom_01")])
def test_two_videos_of_a_call_come_out_as_each_alone(order: tuple[str, str]) -> None:
    videos, attention = ([golden(case)[name] for case in order] for name in ("features", "attention"))
    stage = stage_of(Merging)
    together = list(stage.encode(encode_call(*videos, attention=tuple(attention))).rows)
    for video, received in zip(videos, attention, strict=True):
        alone = stage.encode(encode_call(video, attention=(received,))).rows
        for expected in alone:
            assert torch.equal(together.pop(0), expected)


def tilings(frames: int) -> list[list[tuple[int, int]]]:
    found = []
    for cuts in range(2 ** (frames - 1)):
        ends = [0, *(step + 1 for step in range(frames - 1) if cuts >> step & 1), frames]
        found.append([(first, end - 1) for first, end in pairwise(ends)])
    return found


@FEW
@given(st.integers(0, 10**6), st.integers(1, 7), st.floats(0.2, 0.9))
def test_windows_save_as_much_as_any_tiling_can(seed: int, frames: int, share: float) -> None:
    static = torch.rand(frames - 1, 6, generator=torch.Generator().manual_seed(seed)) < share

    def saved_by(tiling: list[tuple[int, int]]) -> int:
        return sum((end - first) * int(static[first:end].all(0).sum()) for first, end in tiling if end > first)

    got, saved = windows(static)
    assert [frame for first, end in got for frame in range(first, end + 1)] == list(range(frames))
    assert saved == saved_by(got) == max(map(saved_by, tilings(frames)))
    assert windows(static.flip(0))[1] == saved
    assert windows(torch.zeros_like(static)) == ([(frame, frame) for frame in range(frames)], 0)


@FEW
@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.3, 0.6]))
def test_rows_are_exact_or_weighted_means(seed: int, retention: float) -> None:
    frames, attention = drawn(seed), torch.rand(5, 8, generator=torch.Generator().manual_seed(seed))
    answer = stage_of(Merging, retention=retention).encode(encode_call(frames, attention=(attention,)))
    rows, sizes = torch.cat(answer.rows), torch.cat(answer.sizes)
    whole = (rows[:, None] == frames.flatten(0, 1)).all(2).any(1)
    assert whole[sizes == 1].all()
    assert torch.allclose(torch.cat(answer.shares()).sum(1), torch.ones(len(rows)), atol=1e-5)
    plain = stage_of(Merging, retention=retention, threshold=1.0)
    none = plain.encode(encode_call(frames, attention=(attention,)))
    for frame, places in enumerate(none.places):
        expected = attention[frame].topk(-int(-8 * retention // 1)).indices.sort().values
        assert torch.equal(places, expected)


def test_static_places_are_held_once_as_the_mean_over_the_window() -> None:
    frames = drawn(0, 1).expand(4, -1, -1) * torch.tensor([1.0, 2.0, 3.0, 6.0])[:, None, None]
    answer = stage_of(Merging, retention=1.0).encode(encode_call(frames))
    assert [len(own) for own in answer.rows] == [8, 0, 0, 0]
    assert torch.allclose(answer.rows[0], frames.mean(0), atol=1e-6)
    assert answer.sizes[0].tolist() == [4.0] * 8


def test_static_places_do_not_vanish_where_their_share_rounds_to_none() -> None:
    frames = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))
    frames[1, :3] = frames[0, :3]
    answer = stage_of(Merging, retention=0.1).encode(encode_call(frames))
    assert torch.cat(answer.sizes).max() == 6  # three static places of two frames in one row; 3 * 0.104 rounds to 0
    assert int((torch.cat(answer.sizes) > 1).sum()) == 1


@pytest.mark.parametrize("shape", [(1, 8), (3, 1), (2, 2)])
def test_short_videos_and_small_frames(shape: tuple[int, int]) -> None:
    frames = drawn(0, *shape)
    answer = stage_of(Merging, retention=0.2).encode(encode_call(frames))
    assert torch.cat(answer.rows).isfinite().all()
    assert len(torch.cat(answer.rows)) >= 1


def test_pictures_stay_as_they_are() -> None:
    frames = drawn(0)
    answer = stage_of(Merging).encode(encode_call(frames, videos=((0, 2, 4),)))
    assert all(torch.equal(answer.rows[picture], frames[picture]) for picture in (1, 3))
    assert stage_of(Merging).encode(encode_call(frames, videos=())) is None


@pytest.mark.parametrize("case", goldens("holitom_llm"))
def test_recorded_folding_inside_the_llm(case: str) -> None:
    found = golden(case)
    start, length, rows, hidden = (found[name] for name in ("start", "length", "last_row", "hidden"))
    call = prune_call(18, start, length, hidden.shape[1], lambda _, __: rows[:, :, None])
    call = replace(call, hidden=hidden, videos=call.image_id, video_count=1)
    answer = stage_of(Folding, keep=1 - found["drop"]).prune(call)
    kept = (answer.mask | call.text)[0].nonzero()[:, 0]
    assert torch.equal(kept, found["position_ids"][0].long())
    into = answer.merge_into
    after = operators.mean_into(hidden, into)[0, kept]
    folded = torch.bincount(into[0], minlength=hidden.shape[1])[kept] - 1
    once = folded <= 1  # published is one after the other, which is the mean only there
    assert torch.allclose(after[once], found["hidden_after"][0][once], atol=1e-5)
    assert (folded[once] == 1).any()
    assert int(folded.sum()) == hidden.shape[1] - len(kept)
