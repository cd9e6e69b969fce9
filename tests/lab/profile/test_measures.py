"""The measures against closed forms and a restatement with loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dropflow_lab.profile.measures import cross_modal_similarity, ilvas, intra_modal_similarity


def cosine(one: np.ndarray, two: np.ndarray) -> float:
    return float(one @ two / (np.linalg.norm(one) * np.linalg.norm(two)))


def test_intra_modal_similarity_of_states_turned_by_a_known_angle() -> None:
    before = torch.tensor([[[1.0, 0.0]] * 4])
    angles = torch.tensor([0.0, math.pi / 3, math.pi / 2, math.pi])
    after = 5 * torch.stack((angles.cos(), angles.sin()), -1)[None]  # length does not count
    for tokens, expected in (([1, 1, 0, 0], 0.75), ([0, 1, 1, 1], -1 / 6), ([0, 0, 0, 1], -1.0)):
        found = intra_modal_similarity(before, after, torch.tensor([tokens]).bool())
        assert found.tolist() == pytest.approx([expected], abs=1e-6)


def test_a_sample_without_such_tokens_has_no_value() -> None:
    states = torch.randn(2, 3, 4)
    found = intra_modal_similarity(states, states, torch.tensor([[True, False, True], [False] * 3]))
    assert found[0] == pytest.approx(1.0)
    assert found[1].isnan()


def test_cross_modal_similarity_is_the_mean_cosine_of_pairs() -> None:
    one, two = torch.randn(5, 8), torch.randn(5, 8)
    expected = np.mean([cosine(a, b) for a, b in zip(one.numpy(), two.numpy(), strict=True)])
    assert cross_modal_similarity(one, two).item() == pytest.approx(expected, abs=1e-6)
    assert cross_modal_similarity(one, 3 * one).item() == pytest.approx(1.0)


def restated(here: np.ndarray, later: np.ndarray, visual: np.ndarray, top: float) -> float:
    """ILVAS of one sample, token by token."""
    own = [token for token in range(here.shape[1]) if visual[token]]
    count = max(1, math.floor(top * len(own) + 0.5))
    best = sorted(own, key=lambda token: -here[:, token].mean())[:count]
    return sum(cosine(here[:, token], later[:, token]) for token in best) / count


@pytest.mark.parametrize("top", [0.01, 0.2, 0.35, 1.0])
def test_ilvas_token_by_token(top) -> None:
    dice = torch.Generator().manual_seed(0)
    here, later = (torch.rand(3, 4, 20, generator=dice) for _ in range(2))
    visual = torch.rand(3, 20, generator=dice) < torch.tensor([[0.3], [0.6], [0.9]])
    found = ilvas(here, later, visual, top)
    rows = zip(here.numpy(), later.numpy(), visual.numpy(), strict=True)
    assert found.tolist() == pytest.approx([restated(*row, top) for row in rows], abs=1e-6)


def test_ilvas_of_heads_that_swap_is_zero_and_of_a_layer_with_itself_one() -> None:
    here = torch.tensor([[[0.9, 0.0, 0.3], [0.0, 0.5, 0.0]]])  # each token is seen by one head
    visual = torch.ones(1, 3).bool()
    assert ilvas(here, here.flip(1), visual, 1.0).item() == pytest.approx(0.0)
    assert ilvas(here, 2 * here, visual, 1.0).item() == pytest.approx(1.0)


def test_ilvas_looks_at_visual_tokens_only() -> None:
    here, later = torch.rand(1, 2, 6), torch.rand(1, 2, 6)
    visual = torch.tensor([[False, True, True, True, False, False]])
    louder = here.clone()
    louder[:, :, [0, 5]] = 100.0
    assert ilvas(louder, later, visual, 0.5).item() == pytest.approx(ilvas(here, later, visual, 0.5).item())
    assert ilvas(here, later, torch.zeros(1, 6).bool(), 0.5).isnan().all()
