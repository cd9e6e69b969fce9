"""DivPrune: recorded choices, what greedy max-min promises, and what the published code got wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_goldens import FEW, recorded
from tiny import IMAGE, policy, prompt, tiny_llava

import dropflow
from dropflow.policy.plan import resolve
from dropflow.units import BackboneShape
from dropflow_divprune.diversity import max_min


def drawn(seed: int, tokens: int = 30, dim: int = 6) -> torch.Tensor:
    return torch.randn(tokens, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", recorded("divprune"))
def test_recorded_choices(case: str) -> None:
    golden = recorded("divprune")[case]
    count = round(golden["ratio"] * len(golden["x"]))
    assert torch.equal(max_min(golden["x"], count), golden["selected_in_order"])


@FEW
@given(st.integers(0, 10**6), st.integers(1, 30))
def test_a_choice_is_the_formulas(seed: int, count: int) -> None:
    features = drawn(seed).double()
    distance = 1 - torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
    chosen = max_min(features, count).tolist()
    for step, token in enumerate(chosen):
        rest = [i for i in range(30) if i not in chosen[:step]]
        against = [[j for j in range(30) if j != i] if not step else chosen[:step] for i in rest]
        least = {i: float(distance[i, others].min()) for i, others in zip(rest, against, strict=True)}
        # two tokens that are each other's nearest tie, so that rounding may choose either
        assert least[token] == pytest.approx(max(least.values()), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_scale_rotation_and_order_of_the_tokens_do_not_matter(seed: int) -> None:
    features = drawn(seed)
    # all but token 3 lie in one cone: without it, two tokens that are each other's nearest may tie for the first choice
    features[:, 0] = features[:, 0].abs() + 2
    features[3, 0] = -9
    dice = torch.Generator().manual_seed(seed + 1)
    chosen = max_min(features, 12)
    lengths = 0.5 + torch.rand(30, 1, generator=dice)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=dice))[0]
    order = torch.randperm(30, generator=dice)
    assert torch.equal(max_min(features * lengths, 12), chosen)
    assert torch.equal(max_min(features @ rotation, 12), chosen)
    assert torch.equal(order[max_min(features[order], 12)], chosen)
    assert torch.equal(max_min(features, 13)[:12], chosen)


def test_a_token_is_chosen_once_though_few_are_distinct() -> None:
    features = drawn(0, 6).repeat(4, 1)
    chosen = max_min(features, 12)
    assert len(set(chosen.tolist())) == 12
    assert len(set((chosen[:6] % 6).tolist())) == 6
    assert max_min(torch.zeros(3, 2), 5).tolist() == [0, 1, 2]
    assert max_min(features, 0).tolist() == []


def test_the_published_share_is_the_published_number() -> None:
    published = dropflow.load_policy("divprune-56")
    for tokens, kept in ((576, 56), (2340, 229), (2880, 282)):
        assert resolve(published, BackboneShape(32, 576)).schedule(tokens).per_layer == (kept,) * 32


@torch.no_grad()
def test_half_a_token_is_rounded_to_even_as_released() -> None:
    model, inputs = tiny_llava(grid=5), prompt([(3, "I", 5)], grid=5)
    for share, kept in ((0.1, 2), (0.3, 8), (0.5, 12)):  # 2.5, 7.5 and 12.5 of 25
        with dropflow.attach(model, policy(diverse={"use": "divprune/max-min", "keep": share})) as flow:
            model(**inputs)
            assert flow.report().entry_visual_tokens == flow.plan.schedule().entry == kept
    half = dropflow.load_policy(policy(diverse={"use": "divprune/max-min", "keep": 0.5}))
    assert resolve(half, BackboneShape(6, 5)).schedule().entry == 2


@torch.no_grad()
def test_every_image_has_its_own_choice_of_the_projected_tokens() -> None:
    model, inputs = tiny_llava(), prompt()
    plain = model.get_image_features(inputs["pixel_values"]).pooler_output
    with dropflow.attach(model, policy(diverse={"use": "divprune/max-min", "keep": 5})) as flow:
        model(**inputs)
        live = flow.live()[0] & (inputs["input_ids"] == IMAGE)
        kept = model.get_image_features(inputs["pixel_values"])
    assert live.sum(1).tolist() == [5, 10, 0]
    for image, features in enumerate(plain):
        flags = kept.deepstack_features[-1][image]
        expected = max_min(features, 5).sort().values
        assert torch.equal(flags[:, 0].nonzero()[:, 0], expected)
        assert torch.equal(kept.pooler_output[image][expected], features[expected])
