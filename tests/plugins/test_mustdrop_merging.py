"""Spatial merging as a pure function: the recorded results of the published code, and its invariants."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mustdrop_goldens import golden, recorded_names
from torch import Tensor

from dropflow.operators.merging import merge_windows, window_members, window_similarity
from dropflow_mustdrop.key_set import key_indices

CASES = [(name, case) for name in recorded_names("merge_*") for case in golden(name).cases()]


def merge(x: Tensor, window: tuple[int, int], threshold: float) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Per image of `x` (images, 1 + patches, dim): merged rows after CLS, taken windows and patches left; one r."""
    side = math.isqrt(x.shape[1] - 1)
    members = window_members((side, side), window)
    similar = [window_similarity(image[1:], members) for image in x]
    r = min(int((s >= torch.tensor(threshold, dtype=torch.float32)).sum()) for s in similar)
    taken = [torch.sort(s, descending=True, stable=True).indices[:r] for s in similar]
    parts = [merge_windows(image[1:], members, own) for image, own in zip(x, taken, strict=True)]
    rows = [torch.cat((x[i, :1], m, x[i, 1:][left])) for i, (m, left) in enumerate(parts)]
    return rows, taken, [left for _, left in parts]


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{n}-{c}" for n, c in CASES])
def test_recorded_merges(name: str, case: str) -> None:
    recorded: Any = golden(name)
    x, window = recorded[f"{case}/x"], tuple(recorded[f"{case}/window"].tolist())
    side = math.isqrt(x.shape[1] - 1)
    members = window_members((side, side), window)
    similar = torch.stack([window_similarity(image[1:], members) for image in x])
    assert torch.equal(similar, recorded[f"{case}/sim_map"])  # bit for bit, for thresholds one ulp apart
    rows, taken, left = merge(x, window, recorded[f"{case}/threshold"])
    assert all(len(own) == recorded[f"{case}/r"] for own in taken)
    assert torch.equal(torch.stack(taken), recorded[f"{case}/window_order"])
    assert torch.equal(torch.stack([members[own][:, -1] for own in taken]), recorded[f"{case}/dst_idx"])
    assert torch.equal(torch.stack(left), recorded[f"{case}/unm_idx"])
    merged = recorded[f"{case}/merged"]
    # the published accumulation in half precision rounds after each of the additions
    assert (torch.stack(rows).float() - merged.float()).abs().max() <= (2e-6 if x.dtype == torch.float32 else 4e-3)
    sources = torch.stack([members[own][:, :-1] for own in taken]).flatten(1).sort(1).values
    assert torch.equal(sources, recorded[f"{case}/src_idx"].sort(1).values)


def test_recorded_membership() -> None:
    recorded = golden("merge_small")
    x = recorded["a_w3/x"]
    members = window_members((12, 12), (3, 3))
    _, (taken,), (left,) = merge(x, (3, 3), recorded["a_w3/threshold"])
    sizes = torch.cat((torch.ones(1), torch.full((len(taken),), 9.0), torch.ones(len(left))))
    assert torch.equal(sizes, recorded["a_w3/size"][0])
    assert sizes[1:].sum() == 144
    membership = torch.zeros(len(sizes), 145)
    membership[0, 0] = 1
    membership[torch.arange(1, 1 + len(taken))[:, None], 1 + members[taken]] = 1
    membership[torch.arange(1 + len(taken), len(sizes)), 1 + left] = 1
    assert torch.equal(membership, recorded["a_w3/source"][0])
    assert torch.equal(membership.sum(0), torch.ones(145))
    assert torch.equal(membership.sum(1), sizes)


def test_the_minimum_of_a_batch_takes_a_prefix_of_each_images_own_order() -> None:
    x = golden("merge_small")["c_batch2/x"]
    rows, together, _ = merge(x, (3, 3), 0.8)
    alone = [merge(x[i : i + 1], (3, 3), 0.8) for i in (0, 1)]
    counts = [len(taken[0]) for _, taken, _ in alone]
    assert (counts, [len(own) for own in together]) == ([10, 13], [10, 10])
    assert torch.equal(rows[0], alone[0][0][0])
    assert torch.equal(together[1], alone[1][1][0][:10])


def random_image(seed: int, side: int = 6) -> Tensor:
    """CLS and patches that are alike in some windows."""
    dice = torch.Generator().manual_seed(seed)
    smooth = torch.randn(4, 8, generator=dice).repeat_interleave(9, 0)[: side * side]
    members = window_members((side, side), (3, 3)).flatten()
    patches = torch.empty(side * side, 8)
    patches[members] = smooth + torch.randn(side * side, 8, generator=dice) * torch.rand(4, generator=dice)[
        :, None
    ].repeat_interleave(9, 0)
    return torch.cat((torch.randn(1, 8, generator=dice), patches))[None]


@given(st.integers(0, 10_000), st.floats(-0.5, 1))
def test_counts_order_and_sums(seed: int, threshold: float) -> None:
    x = random_image(seed)
    members = window_members((6, 6), (3, 3))
    (rows,), (taken,), (left,) = merge(x, (3, 3), threshold)
    similar = window_similarity(x[0, 1:], members)
    r = len(taken)
    assert r == int((similar >= torch.tensor(threshold, dtype=torch.float32)).sum())
    assert len(rows) - 1 == 36 - 8 * r
    assert bool((similar[taken].diff() <= 0).all())
    assert bool((left.diff() > 0).all())
    assert torch.equal(members[:, -1], members.amax(1))
    weights = torch.cat((torch.full((r,), 9.0), torch.ones(len(left))))[:, None]
    assert torch.allclose((weights * rows[1:]).sum(0), x[0, 1:].sum(0), atol=2e-5)
    scaled, again, _ = merge(x * 4.0, (3, 3), threshold)  # a power of two changes no mantissa
    assert torch.equal(again[0], taken)
    assert torch.equal(scaled[0], rows * 4.0)


@given(st.integers(0, 10_000), st.permutations(range(9)))
def test_the_order_inside_a_window_only_changes_the_rounding(seed: int, order: list[int]) -> None:
    x, members = random_image(seed), window_members((6, 6), (3, 3))
    shuffled = x.clone()
    shuffled[0, 1 + members[0]] = x[0, 1 + members[0][order]]
    before, after = (window_similarity(image[0, 1:], members) for image in (x, shuffled))
    assert torch.allclose(before, after, atol=1e-6)
    taken = torch.tensor([0, 2])
    for ours, theirs in zip(
        merge_windows(x[0, 1:], members, taken), merge_windows(shuffled[0, 1:], members, taken), strict=True
    ):
        assert torch.allclose(ours.float(), theirs.float(), atol=1e-6)


def test_no_window_passes_and_all_pass() -> None:
    x = golden("merge_small")["a_w3/x"]
    (rows,), (taken,), _ = merge(x, (3, 3), 1.0)
    assert len(taken) == 0
    assert torch.equal(rows, x[0])
    common = torch.randn(1, 1, 10, generator=torch.Generator().manual_seed(0)).expand(1, 145, 10)
    (rows,), (taken,), (left,) = merge(common, (3, 3), 0.999)
    assert (len(taken), len(left)) == (16, 0)
    ulp = torch.from_numpy(np.spacing(common[0, 0].abs().numpy()))
    assert bool(((rows[1:] - common[0, :1]).abs() <= ulp).all())
    zeros = torch.zeros(36, 4)
    assert torch.equal(window_similarity(zeros, window_members((6, 6), (3, 3))), torch.zeros(4))


def test_rows_and_columns_behind_the_last_whole_window_belong_to_none() -> None:
    members = window_members((5, 7), (2, 3))
    assert members.tolist() == [
        [0, 1, 2, 7, 8, 9],
        [3, 4, 5, 10, 11, 12],
        [14, 15, 16, 21, 22, 23],
        [17, 18, 19, 24, 25, 26],
    ]
    features = torch.arange(70.0).view(35, 2)
    merged, left = merge_windows(features, members, torch.tensor([3]))
    assert torch.equal(merged[0], features[[17, 18, 19, 24, 25, 26]].mean(0))
    assert len(left) == 29
    assert window_members((2, 2), (3, 3)).shape == (0, 9)


def test_recorded_counts_of_key_tokens() -> None:
    for name in recorded_names("key_count_table*"):
        recorded = golden(name)
        for key in recorded.keys():  # noqa: SIM118
            for *_, rows, keys in recorded[key].tolist():
                assert len(key_indices(torch.arange(rows), 0.08)) == keys
    assert [len(key_indices(torch.zeros(n), 0.08)) for n in (576, 568, 400, 200, 64)] == [47, 46, 32, 16, 6]


def test_ties_among_key_tokens_go_to_the_earlier_row() -> None:
    scores = torch.tensor([0.1, 0.5, 0.2, 0.5, 0.2])
    assert key_indices(scores, 0.6).tolist() == [1, 3, 2]
