"""The differentiable top-k mask: its sums, its gradient, and what it becomes at low temperature."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropflow.operators.relaxation import soft_top, standardised, straight_through
from dropflow.operators.selection import keep_top

IMAGE = torch.tensor([[-1, 0, 0, 0, 0, 1, 1, 1, -1], [-1, -1, 2, 2, 2, 2, 2, 2, 2]])
COUNTS = [2, 1, 4]


def drawn(seed: int = 0) -> torch.Tensor:
    return torch.randn(IMAGE.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    counts=st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 7)),
    temperature=st.sampled_from([1e-3, 0.1, 0.5, 3.0]),
    spread=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_a_mask_sums_to_the_kept_tokens_of_each_image(
    seed: int, counts: tuple[int, int, int], temperature: float, spread: float
) -> None:
    scores = drawn(seed) * spread
    keep = keep_top(scores, IMAGE, counts)
    mask = soft_top(scores, IMAGE, keep, temperature=temperature)
    for image, count in enumerate(counts):
        own = mask[image == IMAGE]
        assert own.sum().item() == pytest.approx(count, abs=1e-6)
        order = scores[image == IMAGE].argsort()
        assert (own[order].diff() >= 0).all()
    assert ((mask >= 0) & (mask <= 1)).all()
    assert (mask[IMAGE < 0] == 0).all()


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
def test_its_gradient_is_that_of_finite_differences(temperature: float) -> None:
    scores = drawn().requires_grad_()
    keep = keep_top(scores.detach(), IMAGE, COUNTS)

    def mask(values: torch.Tensor) -> torch.Tensor:
        own = standardised(values, IMAGE)
        return soft_top(own, IMAGE, keep, temperature=temperature)

    assert torch.autograd.gradcheck(mask, (scores,))
    assert torch.autograd.gradcheck(lambda values: soft_top(values, IMAGE, keep, temperature=temperature), (scores,))


def test_its_jacobian_is_the_closed_form() -> None:
    scores, image = drawn(3)[:1, :6], torch.zeros(1, 6, dtype=torch.long)
    keep = keep_top(scores, image, [2])
    mask = soft_top(scores, image, keep, temperature=0.7)[0]
    slope = mask * (1 - mask)
    expected = (torch.diag(slope) - torch.outer(slope, slope) / slope.sum()) / 0.7
    got = torch.autograd.functional.jacobian(lambda s: soft_top(s[None], image, keep, temperature=0.7)[0], scores[0])
    assert torch.allclose(got, expected, atol=1e-9)
    assert torch.allclose(got.sum(0), torch.zeros(6, dtype=torch.float64), atol=1e-12)


def test_at_low_temperature_it_is_the_hard_mask_and_its_gradient_stays_finite() -> None:
    scores = drawn().requires_grad_()
    keep = keep_top(scores.detach(), IMAGE, COUNTS)
    mask = soft_top(scores, IMAGE, keep, temperature=1e-4)
    assert torch.allclose(mask, keep.to(mask), atol=1e-9)
    mask.square().sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_where_nothing_is_to_be_chosen_there_is_no_gradient() -> None:
    scores = drawn().requires_grad_()
    keep = keep_top(scores.detach(), IMAGE, [4, 0, 3])
    mask = soft_top(scores, IMAGE, keep, temperature=0.5)
    assert mask[0, 1:5].tolist() == [1] * 4
    assert mask[0, 5:8].tolist() == [0] * 3
    (mask * torch.arange(9)).sum().backward()
    assert (scores.grad[0] == 0).all()
    assert (scores.grad[1, 2:] != 0).any()
    assert (scores.grad[1, :2] == 0).all()


def test_standardised_scores_forget_scale_and_offset() -> None:
    scores = drawn()
    once, again = standardised(scores, IMAGE), standardised(scores * 7 + 3, IMAGE)
    for image in range(3):
        own = once[image == IMAGE]
        assert own.mean().item() == pytest.approx(0, abs=1e-12)
        assert own.std(correction=0).item() == pytest.approx(1, abs=1e-3)
        assert torch.allclose(own, again[image == IMAGE], atol=1e-3)
    equal = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    standardised(equal, torch.zeros(1, 4, dtype=torch.long))[0, 0].backward()
    assert torch.isfinite(equal.grad).all()


def test_slots_of_no_image_may_hold_anything() -> None:
    scores = drawn()
    anything = torch.where(IMAGE < 0, torch.tensor(torch.nan), scores)
    keep = keep_top(scores, IMAGE, COUNTS)
    found = []
    for values in (scores.clone().requires_grad_(), anything.requires_grad_()):
        mask = soft_top(standardised(values, IMAGE), IMAGE, keep, temperature=0.5)
        mask[0, 1].backward()
        found.append((mask.detach(), values.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_straight_through_weights_are_exactly_one(dtype: torch.dtype) -> None:
    soft = torch.rand(2, 50, dtype=dtype, requires_grad=True)
    weights = straight_through(soft)
    assert torch.equal(weights, torch.ones_like(soft))
    weights.sum().backward()
    assert torch.equal(soft.grad, torch.ones_like(soft))
