"""Budgets on the host and on the device are the same numbers."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dropflow import Budget, Rounding


@given(
    st.lists(st.integers(0, 3000), max_size=6),
    st.floats(1e-6, 1.0),
    st.sampled_from(["half_up", "floor", "half_even", "ceil"]),
)
def test_shares_round_on_the_device_as_on_the_host(sizes: list[int], share: float, rounding: Rounding) -> None:
    budget = Budget(share=share, rounding=rounding)
    assert budget.of_each(torch.tensor(sizes, dtype=torch.long)).tolist() == [budget.of(size) for size in sizes]


@given(st.lists(st.integers(0, 3000), max_size=6), st.integers(0, 3000))
def test_no_image_keeps_more_than_it_has(sizes: list[int], tokens: int) -> None:
    budget = Budget(tokens=tokens)
    assert budget.of_each(torch.tensor(sizes, dtype=torch.long)).tolist() == [min(tokens, size) for size in sizes]


def test_halves_round_up_or_to_even() -> None:
    sizes = torch.tensor([1, 3, 5, 7, 576])
    found = {name: Budget(share=0.5, rounding=name).of_each(sizes).tolist() for name in ("half_up", "half_even")}
    assert found == {"half_up": [1, 2, 3, 4, 288], "half_even": [0, 2, 2, 4, 288]}
