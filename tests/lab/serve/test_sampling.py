"""Sampling: the right distribution, and the same draws whatever a row is batched with."""

from __future__ import annotations

import pytest
import torch

from dropflow_lab.serve.sampling import Sampler, draw
from dropflow_lab.serve.waiting import Choice

LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()


def shares(temperature: float, top_p: float) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(LOGITS, temperature, top_p, generator) for _ in range(4000)]
    return (torch.tensor(drawn).bincount(minlength=4) / 4000).tolist()


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.5, 0.25, 0.15, 0.1]),
        (1.0, 0.7, [2 / 3, 1 / 3, 0, 0]),
        (1.0, 0.1, [1, 0, 0, 0]),
        (0.5, 1.0, [0.725, 0.181, 0.065, 0.029]),  # the squares, over their sum
    ],
)
def test_tokens_are_drawn_in_proportion(temperature: float, top_p: float, expected: list[float]) -> None:
    assert shares(temperature, top_p) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(("temperature", "top_p"), [(1e-40, 1.0), (5e-324, 1.0), (2.0, 5e-324)])
def test_the_least_values_take_the_likeliest_token(temperature: float, top_p: float) -> None:
    assert shares(temperature, top_p) == [1, 0, 0, 0]


def test_a_row_draws_the_same_alone_and_in_a_batch_and_greedy_rows_stay() -> None:
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    seeded, greedy = Choice(9, temperature=1.5, seed=7), Choice(9)

    def tokens(row: int, choices: list[Choice]) -> list[int]:
        sampler, rows = Sampler(choices), scores[:1].expand(len(choices), -1) if len(choices) == 1 else scores
        return [int(sampler(torch.zeros(1), rows)[row].argmax()) for _ in range(20)]

    scores[1] = scores[0]
    alone = tokens(0, [seeded])
    assert len(set(alone)) > 5
    assert tokens(1, [Choice(9, temperature=1.0, seed=1), seeded, greedy]) == alone
    assert set(tokens(2, [seeded, seeded, greedy])) == {int(scores[2].argmax())}
    untouched = Sampler([greedy] * 3)(torch.zeros(1), scores)
    assert torch.equal(untouched, scores)
