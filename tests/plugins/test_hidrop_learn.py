"""`learn: true` of the concave pyramid: gradients of the keep ratios, the budget, annealing, and the plain policy."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_goldens import FEW
from tiny import policy, prompt, tiny_llava

import dropflow
from dropflow.backbone.flops import LLAVA_7B, vision_only
from dropflow.errors import PolicyError
from dropflow.operators import soft_counted, soft_top
from dropflow.policy.plan import resolve
from dropflow.testing import IMAGE, assert_stage_conforms, tiny_models
from dropflow.units import BackboneShape
from dropflow_hidrop.keep_ratios import KeepRatios, annealed, fitted_counts, share_of_work

PYRAMID = {"use": "hidrop/concave-pyramid", "learn": True}


def learning(**options: Any) -> dict[str, Any]:
    given_options = {"keep": {2: 10, 4: 4}, "budget": {"average_tokens": 6}, **options}
    return policy(
        inject={"use": "hidrop/late-injection", "at": 1},
        pyramid=PYRAMID | given_options,
        exit={"use": "hidrop/early-exit", "at": 5},
    )


def labelled() -> dict[str, Any]:
    inputs = prompt([(3, "I", 9), ("I", 2, "I", 12), (8,)])
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    return inputs | {"labels": labels}


@pytest.mark.parametrize("budget", [{"average_tokens": 6.0}, {"flops": 0.3}])
@pytest.mark.parametrize("progress", [0.0, 0.6])
def test_gradients_of_the_ratios_are_those_of_finite_differences(budget: dict[str, float], progress: float) -> None:
    """Of the whole loss, the budget's and the model's, through the weights of both boundaries."""
    model, inputs = tiny_llava().train(), labelled()
    model.requires_grad_(False)
    with dropflow.attach(model, learning(budget=budget)) as flow:
        flow.progress = progress
        logits: Any = flow.modules["pyramid"].logits
        model(**inputs).loss.backward()
        live = flow.live()
        for place in range(2):
            losses = []
            for step in (4e-3, -4e-3):
                logits.data[place] += step
                losses.append(model(**inputs).loss.item())
                assert torch.equal(flow.live(), live)
                logits.data[place] -= step
            assert (losses[0] - losses[1]) / 8e-3 == pytest.approx(logits.grad[place].item(), rel=0.03, abs=2e-4)


@settings(FEW, max_examples=8)
@given(st.integers(0, 10**6), st.integers(2, 20), st.floats(0.05, 0.95), st.sampled_from([0.1, 0.5, 2.0]))
def test_a_mask_of_a_real_count_sums_to_it_and_its_gradient_is_exact(
    seed: int, size: int, share: float, temperature: float
) -> None:
    dice = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, size + 2, generator=dice, dtype=torch.float64)
    image = torch.tensor([[0] * size + [-1, 1]])
    upstream = torch.randn(size + 2, generator=dice, dtype=torch.float64)

    def loss(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        mask = soft_counted(values, image, counts, temperature=temperature)
        assert mask[0, :size].sum().item() == pytest.approx(counts[0].item(), rel=1e-6)
        return (mask[0] * upstream).sum()

    counts = torch.tensor([share * size, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda values, count: loss(values, torch.cat((count, counts[1:]))),
        (scores.requires_grad_(), counts[:1].clone().requires_grad_()),
        atol=1e-5,
    )


def test_whole_counts_give_the_mask_of_soft_selection() -> None:
    scores = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    image = torch.tensor([[0] * 5 + [-1] * 4, [1] * 6 + [2] * 3])
    keep = torch.zeros(2, 9, dtype=torch.bool)
    keep[0, :2] = keep[1, :3] = keep[1, 6:] = True
    expected = soft_top(scores, image, keep, temperature=0.5)
    assert torch.allclose(soft_counted(scores, image, torch.tensor([2.0, 3.0, 3.0]), temperature=0.5), expected)
    none = soft_counted(scores, image, torch.tensor([0.0, 9.0, 1.0]), temperature=0.5)
    assert (none[0] == 0).all()
    assert (none[1, :6] == 1).all()


def test_inference_keeps_the_learned_shares_whatever_the_progress() -> None:
    model, inputs = tiny_llava(), prompt()
    with dropflow.attach(model, learning()) as flow:
        model(**inputs)
        assert [layer.visual_tokens for layer in flow.report().layers] == pytest.approx([0, 16, 10, 10, 4, 0])
        with torch.no_grad():
            flow.modules["pyramid"].logits.copy_(torch.tensor([0.0, -9.0]))  # type: ignore[operator]
        model(**inputs)
        assert [layer.visual_tokens for layer in flow.report().layers] == pytest.approx([0, 16, 8, 8, 1, 0])
        with torch.no_grad():
            soft = model.train()(**inputs).logits
        assert torch.equal(soft, model.eval()(**inputs).logits)
    hard = learning(keep={2: 8, 4: 1}, learn=False, budget=None)
    with torch.no_grad(), dropflow.attach(model, hard):
        assert torch.equal(model(**inputs).logits, soft)


def test_a_cold_relaxation_is_the_hard_choice() -> None:
    """At the end of training the loss is that of the learned schedule, and few tokens are left in between."""
    model, inputs = tiny_llava().train(), labelled()
    losses = {}
    with dropflow.attach(model, learning(temperature=1.0, final_temperature=1e-4, budget_weight=0.0)) as flow:
        for progress in (0.0, 1.0):
            flow.progress = progress
            losses[progress] = model(**inputs).loss.item()
        live = flow.live().sum((1, 2))
    with dropflow.attach(model, learning(learn=False, budget=None)) as flow:
        hard = model(**inputs).loss.item()
        assert live.tolist() == flow.live().sum((1, 2)).tolist()
    assert losses[1.0] == pytest.approx(hard, rel=1e-3)
    assert abs(losses[0.0] - hard) > 5e-3
    assert annealed(1.0, 0.01, 0.5) == pytest.approx(0.1)


def test_training_meets_the_budget() -> None:
    model, inputs = tiny_llava().train(), labelled()
    model.requires_grad_(False)
    with dropflow.attach(model, learning(keep={2: 14, 4: 12}, budget_weight=500.0)) as flow:
        ratios: Any = flow.modules["pyramid"]
        optimizer = torch.optim.AdamW(ratios.parameters(), lr=0.1, weight_decay=0.0)
        for step in range(40):
            flow.progress = step / 40
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        first, second = (16 * ratios.shares()).tolist()
        assert (16 + 2 * first + second) / 6 == pytest.approx(6, rel=0.1)
        learned = flow.learned_policy()
        counts = learned.stages["pyramid"].options.keep  # type: ignore[attr-defined]
    assert 16 + 2 * counts[2] + counts[4] in (35, 36)
    assert learned.stages["pyramid"].options.model_dump() == {
        **dropflow.load_policy(learning(learn=False, budget=None)).stages["pyramid"].options.model_dump(),
        "keep": counts,
    }


@FEW
@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=6), st.integers(4, 600), st.floats(0.05, 0.9))
def test_counts_are_fitted_to_a_budget_from_below(ratios: list[float], tokens: int, target: float) -> None:
    shares, product = {}, 1.0
    for boundary, ratio in enumerate(ratios):
        product = max(product * ratio, 1e-6)
        shares[boundary] = product

    def cost(counts: Any) -> float:
        return sum(counts) / (tokens * len(counts))

    counts = list(fitted_counts(shares, tokens, cost, target).values())
    assert all(before >= after >= 1 for before, after in pairwise([tokens, *counts]))
    one_each = [1] * len(counts)
    assert cost(counts) <= max(target, cost(one_each)) + 1e-9
    if counts != one_each and counts[0] < tokens:  # one more for each would be too much
        assert cost([count + 1 for count in counts]) > target


def test_work_is_the_papers_formula() -> None:
    ratios = KeepRatios([0.5, 0.1], LLAVA_7B.hidden, LLAVA_7B.intermediate)
    counts, spans = [576.0, 288.0, 57.0], [2, 10, 12]
    expected = sum(span * vision_only(count, LLAVA_7B) for count, span in zip(counts, spans, strict=True))
    found = share_of_work(counts, spans, 32, 576.0, ratios)
    assert found == pytest.approx(expected / (32 * vision_only(576, LLAVA_7B)), rel=1e-12)


def test_learned_shares_where_images_differ_in_size() -> None:
    tiny = tiny_models()["qwen2_5_vl"][1]
    use = PYRAMID | {"keep": {1: 0.5, 3: 0.25}, "budget": {"average_tokens": 4}}
    with dropflow.attach(tiny.model(), policy(pyramid=use)) as flow:
        keep = flow.learned_policy().stages["pyramid"].options.keep  # type: ignore[attr-defined]
    assert keep == {1: 0.5, 3: 0.25}


def test_learned_shares_that_round_to_nothing_keep_a_token() -> None:
    tiny = tiny_models()["qwen2_5_vl"][1]
    use = PYRAMID | {"keep": {1: 0.5, 3: 0.25}, "budget": {"average_tokens": 4}}
    model, (inputs, _) = tiny.model(), tiny.prompt(((3, "I", 5),))
    with dropflow.attach(model, policy(pyramid=use)) as flow:
        (ratios,) = (module for module in model.modules() if isinstance(module, KeepRatios))
        with torch.no_grad():
            ratios.logits.fill_(-6.0)
        learned = flow.learned_policy()
    assert learned.stages["pyramid"].options.keep == {1: 0.0025, 3: 1e-4}  # type: ignore[attr-defined]
    with dropflow.attach(model, learned) as flow, torch.no_grad():
        model(**inputs)
        text = int((inputs["input_ids"] != IMAGE).sum())
        assert [int(live.sum()) - text for live in flow.live()[1:]] == [1] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": None}, "`learn` needs a `budget`"),
        ({"split": "total"}, "leave `split` out"),
        ({"budget": {}}, "expected either `average_tokens` or `flops`"),
        ({"budget": {"flops": 0.5}, "learn": False}, "`budget.flops` is a target of `learn`"),
    ],
)
def test_options_that_cannot_be_learned_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        dropflow.load_policy(learning(**options))


def test_counts_are_refused_where_images_differ_in_size() -> None:
    with pytest.raises(PolicyError, match=r"stages\.pyramid\.keep: `learn` trains shares, and this backbone's images"):
        resolve(dropflow.load_policy(learning()), BackboneShape(6, None))


@pytest.mark.parametrize("keep", [{2: 4, 4: 0}, {2: 0, 4: 0}])
def test_a_start_without_tokens_is_refused(keep: dict[int, int]) -> None:
    message = (
        r"stages\.pyramid\.keep: `learn` starts with a token or more at every boundary, got 0 at [24]; let `hidrop"
    )
    with pytest.raises(PolicyError, match=message):
        resolve(dropflow.load_policy(learning(keep=keep)), BackboneShape(6, 16))


def test_it_meets_the_guarantees() -> None:
    models = {"llava": tiny_models()["llava"]}
    options = {"keep": {0.35: 0.5, 0.7: 0.2}, "learn": True, "budget": {"average_tokens": 5}}
    (cell,) = assert_stage_conforms("hidrop/concave-pyramid", options, models)
    assert cell.outcome == "run"
