"""The tables of a packed vision tower, cut to some of its units."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropflow.backbone.packed_tower import PackedTables, cut_borders, rows_of


def tables(order: list[int] | None, borders: list[int]) -> PackedTables:
    """Tables of units of two rows each."""
    units = borders[-1] // 2
    given = None if order is None else ("order", torch.tensor(order))
    rows = {"positions": torch.arange(2 * units)[:, None] * torch.tensor([1, 10])}
    return PackedTables(rows, {"segments": torch.tensor(borders, dtype=torch.int32)}, given)


def test_rows_borders_and_order_follow_the_units() -> None:
    cut = tables([2, 3, 0, 1], [0, 4, 6, 8]).cut(torch.tensor([0, 2, 3]), 2)
    assert cut.rows["positions"][:, 0].tolist() == [0, 1, 4, 5, 6, 7]
    assert cut.named["order"].tolist() == [1, 2, 0]
    assert cut.borders["segments"].tolist() == [0, 4, 6], "the third segment held unit 1 alone"
    assert cut.borders["segments"].dtype == torch.int32
    assert sorted(cut.named) == ["order", "positions", "segments"]
    plain = tables(None, [0, 4, 8]).cut(torch.tensor([1]), 2)
    assert plain.named["segments"].tolist() == [0, 2]
    assert "order" not in plain.named


def test_tables_of_the_caller_take_the_place_of_computed_ones() -> None:
    own = {"segments": torch.tensor([0, 8]), "order": torch.tensor([3, 2, 1, 0]), "positions": None, "other": 7}
    named = tables([2, 3, 0, 1], [0, 4, 8]).given(own).named
    assert named["segments"].tolist() == [0, 8]
    assert named["order"].tolist() == [3, 2, 1, 0]
    assert named["positions"].shape == (8, 2)
    assert "other" not in named


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_a_cut_equals_tables_made_unit_by_unit(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    count = sum(sizes)
    order = data.draw(st.permutations(range(count)))
    kept = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    borders = [2 * sum(sizes[:number]) for number in range(len(sizes) + 1)]
    cut = tables(list(order), borders).cut(torch.tensor(kept), 2)
    left = [unit for unit in order if unit in kept]
    assert cut.named["order"].tolist() == [kept.index(unit) for unit in left]
    segments, start = [], 0
    for size in sizes:
        segments.append(sum(unit in kept for unit in order[start : start + size]))
        start += size
    expected = [0]
    for size in segments:
        if size:
            expected.append(expected[-1] + 2 * size)
    assert cut.named["segments"].tolist() == expected
    assert cut.named["positions"][:, 0].tolist() == rows_of(torch.tensor(kept), 2).tolist()


def test_borders_without_units() -> None:
    assert cut_borders(torch.tensor([0, 4, 8]), torch.tensor([], dtype=torch.long), 4).tolist() == [0]
