"""Masks gathered by live rows and held columns."""

from __future__ import annotations

import torch

from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.engine.tokens.masks import gather_mask, trimmed

CPU = torch.device("cpu")
LIVE = LiveSet.of(torch.tensor([[True, False, True, True], [False, False, False, True]]))


def keys(live: LiveSet, past: int = 0) -> KeyIndex:
    images = torch.full((live.index.shape[0], live.total), -1)
    return KeyIndex.plain(live.index.shape[0], past, CPU).followed_by(live, images)


def test_no_mask_stays_none_where_nothing_is_padded() -> None:
    even = LiveSet.of(torch.tensor([[True, False, True], [False, True, True]]))
    assert gather_mask(None, even, keys(even), flash=False) is None
    assert gather_mask(None, even, keys(even), flash=True) is None


def test_ragged_samples_get_a_causal_mask_that_hides_padding() -> None:
    mask = gather_mask(None, LIVE, keys(LIVE), flash=False)
    assert mask is not None
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    # padding slots see themselves only, so that no row is empty
    assert mask[1, 0].tolist() == [[True, False, False], [False, True, False], [False, False, True]]
    flash = gather_mask(None, LIVE, keys(LIVE), flash=True)
    assert flash is not None
    assert flash.tolist() == [[True] * 3, [False, False, True]]


def test_a_row_of_padding_sees_itself_in_a_boolean_mask_and_no_row_is_empty() -> None:
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    total = causal.expand(2, 1, 4, 4).clone()
    total[1, :, :, :3] = False  # the model's own mask hides padding
    mask = gather_mask(total, LIVE, keys(LIVE), flash=False)
    assert mask is not None
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert mask[1, 0].tolist() == [[True, False, False], [False, True, False], [False, False, True]]


def test_columns_of_tokens_to_come_are_left_out() -> None:
    causal = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    held = keys(LIVE)
    for mask in (causal, torch.where(causal, 0.0, -1e9)):
        narrow = gather_mask(mask, LIVE, held, flash=False)
        wide = torch.nn.functional.pad(mask, (0, 3))
        assert torch.equal(gather_mask(wide, LIVE, held, flash=False), narrow)
        assert torch.equal(trimmed(wide, 4), mask)
    assert trimmed(None, 4) is None


def test_the_models_own_mask_is_gathered_by_row_and_column() -> None:
    total = torch.arange(2 * 4 * 6).view(2, 1, 4, 6) % 2 == 0
    held = keys(LIVE, past=2)
    picked = gather_mask(total, LIVE, held, flash=False)
    assert picked is not None
    assert picked.shape == (2, 1, 3, 5)
    assert torch.equal(picked[0, 0], total[0, 0][[0, 2, 3]][:, [0, 1, 2, 4, 5]])
    assert picked[1, 0, 2].tolist() == [*total[1, 0, 3, :2].tolist(), False, False, bool(total[1, 0, 3, 5])]
    additive = torch.where(total, 0.0, -1e9)
    bias = gather_mask(additive, LIVE, held, flash=False)
    assert bias is not None
    assert bias[1, 0, 2, 2] == torch.finfo(torch.float32).min
    assert bias[0, 0, 1, 3] == additive[0, 0, 2, 4]
    padding = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    columns = gather_mask(padding, LIVE, held, flash=True)
    assert columns is not None
    assert columns.tolist() == [[0, 1, 1, 1, 1], [1, 1, 0, 0, 1]]


def test_implicit_entries_are_the_generated_tokens() -> None:
    held = keys(LIVE)
    grown = held.upto(6)
    assert grown.logical[0].tolist() == [0, 2, 3, 4, 5]
    assert grown.valid is not None
    assert grown.valid[1].tolist() == [False, False, True, True, True]
    assert held.upto(4) is held
    assert not held.complete
    assert KeyIndex.plain(1, 3, CPU).complete
    shared = torch.tensor([1, 0])
    assert held.rows(shared, lambda: shared) is held.rows(shared, lambda: shared)
    assert held.rows(shared, lambda: shared).logical[1].tolist() == [0, 2, 3]
