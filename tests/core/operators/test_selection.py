"""Top-k per image against its definition."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dropflow.operators import keep_top, top


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 2)), min_size=1, max_size=14),
    st.tuples(*[st.integers(0, 5)] * 3),
)
def test_exactly_k_of_every_image_ties_to_the_lowest_index(
    tokens: list[tuple[int, int]], counts: tuple[int, ...]
) -> None:
    scores = torch.tensor([[score / 4 for score, _ in tokens]] * 2)
    image = torch.tensor([[group for _, group in tokens]] * 2)
    keep = keep_top(scores, image, counts)
    ties = keep_top(scores, image, counts, keep_ties=True)
    expected, with_ties = set(), set()
    for group, count in enumerate(counts):
        own = [i for i, (_, g) in enumerate(tokens) if g == group]
        ranked = sorted(own, key=lambda i: (-tokens[i][0], i))
        expected |= set(ranked[:count])
        if own and count:
            border = tokens[ranked[min(count, len(own)) - 1]][0]
            with_ties |= {i for i in own if tokens[i][0] >= border}
    for row in range(2):
        assert set(keep[row].nonzero()[:, 0].tolist()) == expected
        assert set(ties[row].nonzero()[:, 0].tolist()) == with_ties


def test_the_published_example_of_ties() -> None:
    scores, image = torch.tensor([[0.1, 0.2, 0.2, 0.2, 0.9]]), torch.zeros(1, 5, dtype=torch.long)
    kept = [keep_top(scores, image, [k], keep_ties=True)[0].nonzero()[:, 0].tolist() for k in (1, 2, 3, 4, 5)]
    assert kept == [[4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4]]
    exact = [keep_top(scores, image, [k])[0].nonzero()[:, 0].tolist() for k in (1, 2, 3)]
    assert exact == [[4], [1, 4], [1, 2, 4]]
    alone = torch.zeros(1, 1, dtype=torch.long)
    assert keep_top(torch.tensor([[0.3]]), alone, [1], keep_ties=True).all()


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, torch.inf, -torch.inf, torch.nan]), min_size=1, max_size=9), st.data())
def test_nan_is_kept_after_every_number(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values)
    numbers = [i for i, value in enumerate(values) if value == value and value > -torch.inf]
    ranked = sorted(numbers, key=lambda i: (-values[i], i)) + [i for i in range(len(values)) if i not in numbers]
    assert top(scores, count).tolist() == ranked[:count]
    image = torch.zeros(1, len(values), dtype=torch.long)
    assert keep_top(scores[None], image, [count])[0].nonzero()[:, 0].tolist() == sorted(ranked[:count])


def test_counts_on_the_device_are_those_of_the_host() -> None:
    scores = torch.rand(2, 9, generator=torch.Generator().manual_seed(0))
    image = torch.tensor([[-1, 0, 0, 0, 1, 1, 1, 1, -1], [2, 2, 2, 2, 2, -1, -1, 3, 3]])
    counts = [2, 1, 3, 0]
    assert torch.equal(keep_top(scores, image, torch.tensor(counts)), keep_top(scores, image, counts))
    assert keep_top(scores, image, counts).sum(1).tolist() == [3, 3]
