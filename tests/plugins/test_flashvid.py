"""FlashVID: recorded segments, budgets, choices and rows, what they promise, and what the published code got wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llm_goldens import prune_call, stage_of
from method_goldens import FEW
from video_goldens import encode_call, golden, goldens

from dropflow import Encode
from dropflow_flashvid import LateRank, TreeMerging
from dropflow_flashvid.segments import budgets, segments
from dropflow_flashvid.selection import event_weight, unlike
from dropflow_flashvid.trees import Trees


def drawn(seed: int, frames: int = 5, rows: int = 8, dim: int = 6, step: float = 0.3) -> torch.Tensor:
    """Frames that change slowly."""
    dice = torch.Generator().manual_seed(seed)
    first = torch.randn(1, rows, dim, generator=dice)
    return first + step * torch.randn(frames, rows, dim, generator=dice).cumsum(0)


def stage_for(found: dict[str, Any], **more: Any) -> Any:
    return stage_of(
        TreeMerging,
        retention=found["opt_retention_ratio"],
        alpha=found["opt_alpha"],
        events=found["opt_token_selection_method"] == "attn_div_v2",
        segment_threshold=found["opt_segment_threshold"],
        fewest_segments=found["opt_min_segment_num"],
        merge_threshold=found["opt_temporal_threshold"],
        **{"published_means": True} | more,
    )


def placed(answer: Encode, frames: torch.Tensor, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a video at their places (zeros elsewhere), and which places have one."""
    assert answer.rows is not None
    assert answer.places is not None
    found, has = torch.zeros_like(frames), torch.zeros(frames.shape[:2], dtype=torch.bool)
    for frame in range(len(frames)):
        own = answer.places[first + frame]
        found[frame, own], has[frame, own] = answer.rows[first + frame], True
    return found.flatten(0, 1), has.flatten()


@pytest.mark.parametrize("case", goldens("flashvid_segment"))
def test_recorded_segments(case: str) -> None:
    found = golden(case)
    got = segments(found["frame_means"], found["threshold"], found["minimum"])
    lengths = [end - first for first, end in got]
    assert lengths == [length for length in found["lengths"].tolist() if length]  # the recorded code has empty ones
    assert got[0][0] == 0
    assert got[-1][1] == len(found["frame_means"])


def test_recorded_budgets() -> None:
    table = golden("flashvid_budget")["table"].tolist()
    assert len(table) == 24
    for rows, retention, most, selected, rest in table:
        assert budgets(int(rows), retention, 0.7) == (selected, rest)
        assert selected + rest == most
    assert budgets(10, 1.0, 0.7) == (7, 3), "no more than the frame has"


@pytest.mark.parametrize("case", goldens("flashvid_adts"))
def test_recorded_selections(case: str) -> None:
    found = golden(case)
    weight = found["attention"]
    if found["method"] == "attn_div_v2":
        weight = weight * event_weight(found["features"])
    assert torch.equal(unlike(found["features"], weight, found["count"]), found["index"].long().sort(1).values)


@pytest.mark.parametrize("case", goldens("flashvid_tstm"))
def test_recorded_trees(case: str) -> None:
    found = golden(case)
    frames, free = found["features"], found["free"].bool()
    least = len(frames) * (found["adts"] + found["rest"])
    trees = Trees.grown(frames, free, found["threshold"], least).blend(free, published=True)
    left = trees.counts(*frames.shape[:2]) > 0
    assert torch.equal(left.nonzero(), torch.stack((found["frame"], found["token"]), 1).long())
    assert torch.allclose(trees.sums(frames)[left], found["out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", goldens("flashvid"))
def test_recorded_rows_through_the_stage(case: str) -> None:
    found = golden(case)
    frames = found["features"]
    answer = stage_for(found).encode(encode_call(frames, attention=(found["attention"],)))
    rows, has = placed(answer, frames)
    index = found["index"].long()
    assert torch.equal(has.nonzero()[:, 0], index.unique())
    assert len(index) - len(index.unique()) == found["duplicates"]
    error = (rows[index] - found["out"]).abs().amax(1)
    assert int((error > 1e-5).sum()) == found["duplicates"], "of two rows for one place, the selected one stays"
    shares = answer.shares()
    again = torch.cat([own @ frames.flatten(0, 1) for own in shares])
    assert torch.allclose(again, torch.cat(answer.rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [("flashvid_03", "flashvid_07"), ("flashvid_07", "flashvid_03")])
def test_two_videos_of_a_call_come_out_as_each_alone(order: tuple[str, str]) -> None:
    videos, attention = ([golden(case)[name] for case in order] for name in ("features", "attention"))
    stage = stage_of(TreeMerging, fewest_segments=1)
    together, first = stage.encode(encode_call(*videos, attention=tuple(attention))), 0
    for video, received in zip(videos, attention, strict=True):
        alone = stage.encode(encode_call(video, attention=(received,)))
        for got, expected in zip(placed(together, video, first), placed(alone, video), strict=True):
            assert torch.equal(got, expected)
        first += len(video)


def test_a_tree_of_equal_frames_is_the_token_and_not_three_times_it() -> None:
    found = golden("flashvid_defect_chain")
    frames = found["features"]
    free = torch.ones(frames.shape[:2], dtype=torch.bool)
    for published, times in ((True, 3), (False, 1)):
        trees = Trees.grown(frames, free, 0.8, 1).blend(free, published=published)
        assert torch.allclose(trees.sums(frames)[0], times * frames[0], rtol=1e-5)
    assert torch.allclose(found["out"], 3 * frames[0], rtol=1e-5)


def test_merged_rows_are_not_longer_than_what_they_sum_up() -> None:
    found = golden("flashvid_defect_depth")
    frames = found["features"]
    options = {"retention": 0.25, "fewest_segments": found["opt_min_segment_num"], "events": False}
    longest = frames.norm(dim=-1).max()
    rows = stage_of(TreeMerging, **options).encode(encode_call(frames, attention=(found["attention"],))).rows
    assert torch.cat(rows).norm(dim=1).max() <= longest * (1 + 1e-5)
    assert found["norm_ratio"].max() > 1


@FEW
@given(st.integers(0, 10**6), st.sampled_from([0.2, 0.4, 0.7]), st.sampled_from([1, 3]))
def test_rows_are_means_of_what_they_stand_for_and_stand_for_all_of_a_segment(
    seed: int, retention: float, fewest: int
) -> None:
    frames, attention = drawn(seed), torch.rand(5, 8, generator=torch.Generator().manual_seed(seed))
    call = encode_call(frames, attention=(attention,))
    answer = stage_of(TreeMerging, retention=retention, fewest_segments=fewest).encode(call)
    sizes, rows = torch.cat(answer.sizes), torch.cat(answer.rows)
    selected, rest = budgets(8, retention, 0.7)
    if rest:
        assert float(sizes.sum()) == frames.shape[0] * frames.shape[1]
        assert torch.allclose((sizes[:, None] * rows).sum(0), frames.sum((0, 1)), atol=1e-4)
    exact = (rows[:, None] == frames.flatten(0, 1)).all(2).any(1)
    assert int(exact.sum()) >= 5 * selected
    assert len(rows) <= 5 * (selected + rest + 1)
    assert torch.allclose(torch.cat(answer.shares()).sum(1), torch.ones(len(rows)), atol=1e-5)


def test_a_threshold_of_1_merges_nothing_and_one_below_all_cosines_no_selected_token() -> None:
    frames = drawn(0, 1, 40, 64).repeat(6, 1, 1)
    free = torch.ones(frames.shape[:2], dtype=torch.bool)
    assert Trees.grown(frames, free, 1.0, 1).children.sum() == 0
    free[:, ::2] = False
    trees = Trees.grown(frames, free, -2.0, 1)
    own = torch.arange(free.numel()).view(free.shape)
    assert torch.equal(trees.root[~free], own[~free])
    assert free.flatten()[trees.root[free]].all()
    assert (trees.root[1:] != own[1:])[free[1:]].all()


def test_no_token_is_selected_twice_where_weights_are_negative() -> None:
    frames = drawn(1, 1, 10)
    chosen = unlike(frames, -torch.rand(1, 10, generator=torch.Generator().manual_seed(0)), 6)
    assert len(chosen[0].unique()) == 6
    assert unlike(frames[:, :1], torch.ones(1, 1), 1).tolist() == [[0]]


@pytest.mark.parametrize("options", [{"merge_threshold": 1.0}, {"retention": 0.8}, {"retention": 1.0}, {"alpha": 1.0}])
def test_settings_at_which_the_published_code_fails(options: dict[str, Any]) -> None:
    frames, attention = drawn(0), torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    call = encode_call(frames, attention=(attention,))
    answer = stage_of(TreeMerging, fewest_segments=1, **options).encode(call)
    selected, rest = budgets(8, options.get("retention", 0.25), options.get("alpha", 0.7))
    left = [len(own) for own in answer.rows]
    assert all(own >= selected for own in left)
    assert sum(left) >= 5 * (selected + rest)
    if options.get("retention", 0) >= 0.8:
        assert torch.equal(torch.cat(answer.rows), frames.flatten(0, 1))


def test_a_zero_token_and_one_token_per_frame_are_no_trouble() -> None:
    frames = drawn(2)
    frames[2] = 0
    for video in (frames, frames[:, :1], frames[:1]):
        attention = torch.rand(video.shape[:2], generator=torch.Generator().manual_seed(0))
        answer = stage_of(TreeMerging, fewest_segments=1).encode(encode_call(video, attention=(attention,)))
        assert torch.cat(answer.rows).isfinite().all()
        assert all(len(own) >= 1 for own in answer.rows[:1])


def test_pictures_stay_as_they_are() -> None:
    frames = drawn(0)
    call = encode_call(frames, videos=((0, 2, 4),))
    answer = stage_of(TreeMerging, fewest_segments=1).encode(call)
    for picture in (1, 3):
        assert torch.equal(answer.rows[picture], frames[picture])
        assert torch.equal(answer.shares()[picture], torch.eye(8))
    assert stage_of(TreeMerging).encode(encode_call(frames, videos=())) is None


def test_recorded_ranking_inside_the_llm() -> None:
    found = golden("flashvid_llm_01")
    start, length, rows = found["start"], found["length"], found["last_row"]
    call = prune_call(20, start, length, rows.shape[2], lambda _, __: rows[:, :, None])
    stage = stage_of(LateRank, keep=found["ratio"])
    mask = stage.prune(replace(call, videos=call.image_id, video_count=1)).mask[0]
    assert torch.equal(mask.nonzero()[:, 0], found["keep"].long())
    assert int(mask[start : start + length].sum()) == found["count"]
    pictures = replace(call, videos=torch.full_like(call.image_id, -1), video_count=1)
    assert stage.prune(pictures).mask.all()
