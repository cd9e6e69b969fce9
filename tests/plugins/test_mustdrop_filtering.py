"""The dual-attention filter as a pure function: recorded results, monotonicity and strictness."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mustdrop_goldens import golden, recorded_names
from torch import Tensor

from dropflow_mustdrop import equal_token_number
from dropflow_mustdrop.filtering import attention_scores, block_totals, blocks, dual_keep, dual_ranking

CASES = [
    (name, key.rsplit("/", 1)[0])
    for name in recorded_names("dual_attention_filter*")
    for key in golden(name).keys()  # noqa: SIM118
    if key.endswith("/thr")
]


def scores(attention: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """G and M (batch, count) of the visual tokens of a map (batch, heads, n, n), from the rows after them."""
    rows = attention[:, :, start + count :, start : start + count]
    return attention_scores(rows.split(5, 2))  # in parts, as the stage computes them


def keeps(sums: Tensor, peaks: Tensor, gamma: float, alpha: float) -> Tensor:
    return dual_keep(sums, peaks, block_totals(sums, torch.ones_like(sums).bool()), gamma, alpha)


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{n}-{c}" for n, c in CASES])
def test_recorded_filters(name: str, case: str) -> None:
    recorded, group = golden(name), case.split("/")[0]
    sums, peaks = scores(recorded[f"{group}/attn"], recorded[f"{group}/v_token_start"], recorded[f"{group}/img_seq"])
    gamma, alpha = recorded[f"{case}/thr"].tolist()
    assert keeps(sums, peaks, gamma, alpha)[0].nonzero()[:, 0].tolist() == recorded[f"{case}/keep"].tolist()


def test_recorded_scores() -> None:
    recorded = golden("dual_attention_filter")
    sums, peaks = scores(recorded["a/attn"], recorded["a/v_token_start"], recorded["a/img_seq"])
    assert torch.allclose(sums[0], recorded["a/G"], rtol=1e-6, atol=0)
    assert torch.equal(peaks[0], recorded["a/M"])
    total = block_totals(sums, torch.ones_like(sums).bool())
    assert total[0].unique().item() == pytest.approx(recorded["a/total"], rel=1e-6)


def test_recorded_filters_in_half_precision_agree_on_this_map() -> None:
    recorded = golden("dual_attention_filter")
    sums, peaks = recorded["d_half/G"][None], recorded["d_half/M"][None]
    for case in range(11):
        kept = keeps(sums, peaks, *recorded[f"a/case{case}/thr"].tolist())
        assert kept[0].nonzero()[:, 0].tolist() == recorded[f"d_half/case{case}/keep"].tolist()


def test_a_map_counts_its_own_sample_and_text_rows_only() -> None:
    recorded: Any = golden("dual_attention_filter")
    attention, start, count = recorded["a/attn"], recorded["a/v_token_start"], recorded["a/img_seq"]
    alone = scores(attention, start, count)
    noise = torch.rand(attention.shape, generator=torch.Generator().manual_seed(0))
    both = scores(torch.cat((attention, noise)), start, count)
    elsewhere = attention.clone()
    elsewhere[:, :, : start + count] = noise[:, :, : start + count]
    shuffled = attention[:, [2, 0, 3, 1]]
    order = torch.randperm(attention.shape[2] - start - count, generator=torch.Generator().manual_seed(1))
    permuted = attention.clone()
    permuted[:, :, start + count :] = attention[:, :, start + count :][:, :, order]
    for other in (
        both,
        scores(elsewhere, start, count),
        scores(shuffled, start, count),
        scores(permuted, start, count),
    ):
        for ours, theirs in zip(alone, other, strict=True):
            assert torch.allclose(ours[0], theirs[0], rtol=1e-5)
    gamma, alpha = recorded["a/case6/thr"].tolist()
    assert keeps(*both, gamma, alpha)[0].nonzero()[:, 0].tolist() == recorded["b_batch2/keep"].tolist()
    doubled = scores(attention * 2, start, count)
    assert torch.equal(keeps(*doubled, gamma, 9.0), keeps(*alone, gamma, 9.0))
    assert torch.equal(keeps(*doubled, 9.0, alpha), keeps(*alone, 9.0, alpha / 2))


maps = st.integers(0, 10_000).map(
    lambda seed: torch.randn(1, 2, 5, 9, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)
)
threshold = st.floats(0, 0.6)


@given(maps, threshold, threshold, threshold, threshold)
def test_a_higher_threshold_only_drops_more(
    attention: Tensor, gamma: float, alpha: float, more: float, higher: float
) -> None:
    sums, peaks = attention_scores([attention])
    kept = keeps(sums, peaks, gamma, alpha)
    assert not bool((keeps(sums, peaks, gamma + more, alpha + higher) & ~kept).any())
    assert bool(keeps(sums, peaks, 0.0, alpha).all())
    assert bool(keeps(sums, peaks, gamma, 0.0).all())
    only_global = keeps(sums, peaks, gamma, torch.inf)
    only_individual = keeps(sums, peaks, torch.inf, alpha)
    assert torch.equal(kept, only_global | only_individual)
    assert torch.equal(only_global, keeps(sums, peaks, gamma, 1.0 + float(peaks.max())))
    assert torch.equal(only_individual, keeps(sums, peaks, 1.5, alpha))


@given(st.lists(st.integers(1, 15), min_size=2, max_size=8), st.data())
def test_reaching_a_threshold_keeps(numbers: list[int], data: st.DataObject) -> None:
    """Dyadic scores, whose shares are exact: strict comparison on both sides."""
    scale = 2.0 ** sum(numbers).bit_length()
    numbers = [*numbers, int(scale) - sum(numbers)]  # the total is a power of two
    sums = torch.tensor([numbers]) / scale
    chosen = data.draw(st.integers(0, len(numbers) - 1))
    at = float(sums[0, chosen])
    above = float(torch.nextafter(torch.tensor(at), torch.tensor(2.0)))
    assert bool(keeps(sums, sums, at, 9.0)[0, chosen])
    assert bool(keeps(sums, sums, 9.0, at)[0, chosen])
    assert not bool(keeps(sums, sums, above, above)[0, chosen])


@given(maps, st.floats(0.01, 0.6), st.floats(0.01, 0.6))
def test_the_ranking_is_the_factor_up_to_which_a_token_stays(attention: Tensor, gamma: float, alpha: float) -> None:
    sums, peaks = attention_scores([attention])
    totals = block_totals(sums, torch.ones_like(sums).bool())
    ranking = dual_ranking(sums, peaks, totals, gamma, alpha)
    for factor in ranking[0].tolist():
        assert bool(
            dual_keep(sums, peaks, totals, gamma * factor * 0.999, alpha * factor * 0.999)[ranking >= factor].all()
        )
        assert not bool(
            dual_keep(sums, peaks, totals, gamma * factor * 1.001, alpha * factor * 1.001)[ranking <= factor].any()
        )


def test_pictures_with_text_in_between_have_totals_of_their_own() -> None:
    visual = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0, 1]]).bool()
    assert blocks(visual).tolist() == [[0, 1, 1, 0, 2, 2, 2], [1, 0, 0, 0, 0, 0, 2]]
    sums = torch.tensor([[9.0, 1, 2, 9, 3, 4, 5], [7, 9, 9, 9, 9, 9, 8]])
    assert block_totals(sums, visual).tolist() == [[0, 3, 3, 0, 12, 12, 12], [7, 0, 0, 0, 0, 0, 8]]
    with pytest.raises(ValueError, match="at least one part"):
        attention_scores([])


def test_token_numbers_of_the_paper() -> None:
    def layers(*counts: int) -> list[int]:
        return [n for n, times in zip(counts, (3, 4, 4, 4, 17), strict=True) for _ in range(times)]

    assert equal_token_number(layers(72, 43, 36, 35, 32)) == 36.75
    assert equal_token_number(layers(72, 6, 6, 6, 6)) == 10.125
    assert equal_token_number(layers(72, 72, 72, 72, 72)) == 72
    assert equal_token_number(layers(240, 140, 111, 102, 95), images=3) == 37.520833333333336
