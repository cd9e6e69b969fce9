"""SCOPE: recorded choices, what a greedy choice promises, and what the released code got wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from goldens_2026 import encode_call, golden, layer_of_cls_rows
from hypothesis import given
from hypothesis import strategies as st
from llm_goldens import stage_of
from method_goldens import FEW
from tiny import IMAGE, policy, prompt, tiny_llava
from torch import Tensor

import dropflow
from dropflow.policy.plan import resolve
from dropflow.testing import tiny_models
from dropflow.units import BackboneShape
from dropflow_scope import SaliencyCoverage
from dropflow_scope.coverage import greedy

STAGE = "scope/saliency-coverage"
CHOICES = ("alpha05", "basic", "duplicates", "no_attention", "one_token")


def drawn(seed: int, tokens: int = 30, dim: int = 6) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, dim, generator=dice), torch.rand(tokens, generator=dice)


def cls_rows(attention: Tensor) -> Tensor:
    """One head whose CLS row attends to patches in this proportion, and to itself a little."""
    own = attention / attention.sum() * 0.9
    return torch.cat((torch.tensor([0.1]), own))[None, None]


@pytest.mark.parametrize("case", CHOICES)
def test_recorded_choices(case: str) -> None:
    recorded = golden(f"scope_{case}")
    features, meta, order = recorded["features"][0], recorded["meta"], recorded["out_order"][0]
    attention = recorded["attention"][0] if "attention" in recorded else torch.ones(len(features))
    options = {"alpha": meta["alpha"], "combine": meta["combine"]}
    assert torch.equal(greedy(features, attention, meta["k"], **options), order)
    stage = stage_of(SaliencyCoverage, keep=meta["k"], **options)
    answer = stage.encode(encode_call([features], layer_of_cls_rows(cls_rows(attention))))
    assert torch.equal(answer.keep[0].nonzero()[:, 0], order.sort().values)


def test_a_recorded_tower() -> None:
    recorded = golden("scope_tower")
    rows, expected = recorded["hidden"][0, 1:], recorded["out_index_unsorted"][0] - 1
    stage = stage_of(SaliencyCoverage, keep=recorded["meta"]["asked"])
    answer = stage.encode(encode_call([rows], layer_of_cls_rows(recorded["cls_rows"])))
    assert torch.equal(answer.keep[0].nonzero()[:, 0], expected.sort().values)
    assert torch.equal(rows[answer.keep[0]], recorded["out_rows"][0])
    torch.testing.assert_close(answer.scores()[0].float(), recorded["cls_rows"][0].sum(0)[1:])


@FEW
@given(st.integers(0, 10**6), st.integers(1, 30), st.sampled_from(["multi", "add"]), st.sampled_from([0.5, 1.0]))
def test_a_choice_is_the_formulas(seed: int, count: int, combine: str, alpha: float) -> None:
    features, saliency = (own.double() for own in drawn(seed))
    similar = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
    covered = torch.zeros(30, dtype=torch.float64)
    chosen = greedy(features, saliency, count, combine=combine, alpha=alpha).tolist()
    assert len(set(chosen)) == count
    for step, token in enumerate(chosen):
        score = {}
        for v in set(range(30)) - set(chosen[:step]):
            gain = float((similar[:, v] - covered).clamp(min=0).sum())
            weight = float(saliency[v] ** alpha)
            score[v] = gain * weight if combine == "multi" else gain + weight
        assert score[token] == pytest.approx(max(score.values()), abs=1e-5)
        covered = covered.maximum(similar[token])


@pytest.mark.parametrize("seed", range(5))
def test_scale_and_order_of_the_tokens_do_not_matter(seed: int) -> None:
    features, saliency = drawn(seed)
    dice = torch.Generator().manual_seed(seed + 1)
    chosen, order = greedy(features, saliency, 12), torch.randperm(30, generator=dice)
    assert torch.equal(greedy(features * (0.5 + torch.rand(30, 1, generator=dice)), saliency * 7, 12), chosen)
    assert torch.equal(order[greedy(features[order], saliency[order], 12)], chosen)
    assert torch.equal(greedy(features, saliency, 13)[:12], chosen)


def test_tokens_that_have_nothing_in_common_are_ranked_by_saliency() -> None:
    _, saliency = drawn(0, 12)
    assert torch.equal(greedy(torch.eye(12), saliency, 5, alpha=0.5), saliency.topk(5).indices)


def test_a_row_of_zeros_is_chosen_last_and_spoils_nothing() -> None:
    """The released code divides by its length, and then chooses the first tokens of the image."""
    features, saliency = drawn(3)
    without = greedy(torch.cat((features[:7], features[8:])), torch.cat((saliency[:7], saliency[8:])), 29)
    features[7] = 0
    assert torch.equal(greedy(features, saliency, 30), torch.cat((without + (without >= 7), torch.tensor([7]))))


def test_an_image_with_fewer_tokens_keeps_each_once() -> None:
    features, saliency = drawn(1, 5)
    assert sorted(greedy(features, saliency, 9).tolist()) == [0, 1, 2, 3, 4]
    assert greedy(features, saliency, 0).tolist() == []


def test_what_fills_up_once_all_is_covered() -> None:
    features, saliency = torch.ones(8, 3), torch.tensor([1.0, 5, 2, 8, 3, 7, 4, 6])
    assert greedy(features, saliency, 4).tolist() == [3, 0, 1, 2]
    assert greedy(features, saliency, 4, fill="attention").tolist() == [3, 5, 7, 1]
    recorded = golden("scope_duplicates")
    filled = greedy(recorded["features"][0], recorded["attention"][0], 7, fill="attention")
    assert filled.tolist() == [11, 10, 9, 8, 7, 6, 5]


@torch.no_grad()
def test_every_image_has_the_whole_budget_whatever_else_is_in_the_call() -> None:
    """The released code divides one budget by the images of a call, and fails for a list of them."""
    model, inputs = tiny_llava(), prompt()
    eager = tiny_llava(attention="eager").model.vision_tower
    seen = eager(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    with dropflow.attach(model, policy(scope={"use": STAGE, "keep": 5})) as flow:
        model(**inputs)
        live = flow.live()[0] & (inputs["input_ids"] == IMAGE)
        kept = model.get_image_features(inputs["pixel_values"]).deepstack_features[-1]
        alone = [model.get_image_features(one[None]).deepstack_features[-1][0] for one in inputs["pixel_values"]]
        forecast = flow.plan.schedule().entry
    assert live.sum(1).tolist() == [5, 10, 0]
    assert forecast == 5
    for image in range(3):
        patches, attention = seen.hidden_states[-2][image, 1:], seen.attentions[-2][image, :, 0, 1:].sum(0)
        expected = greedy(patches, attention, 5).sort().values
        for flags in (kept[image], alone[image]):
            assert torch.equal(flags[:, 0].nonzero()[:, 0], expected)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next"])
@torch.no_grad()
def test_towers_without_the_published_place_are_reduced_after_the_projector(family: str) -> None:
    _, tiny = tiny_models()[family]
    model, (inputs, _) = tiny.model(), tiny.prompt(((3, "I", 5),))
    with dropflow.attach(model, policy(scope={"use": STAGE, "keep": 0.5, "layer": -1})) as flow:
        model(**inputs)
        prompt_ = flow._last().prompt
        assert flow.plan.encode_at.keys() == {None}
    for image in range(int(prompt_.scored.max()) + 1):
        own = prompt_.scored == image
        assert int((own & prompt_.present).sum()) == int(int(own.sum()) / 2 + 0.5)


@pytest.mark.parametrize("tokens", [64, 128, 192])
def test_published_settings(tokens: int) -> None:
    found = resolve(dropflow.load_policy(f"scope-{tokens}"), BackboneShape(32, 576)).schedule()
    assert found.per_layer == (tokens,) * 32
    wide = {64: 160, 128: 320, 192: 640}[tokens]
    tiled = resolve(dropflow.load_policy(f"scope-next-{wide}"), BackboneShape(32, 2880)).schedule()
    assert tiled.per_layer == (wide,) * 32


def test_together_with_pyramiddrop() -> None:
    found = resolve(dropflow.load_policy("scope-pyramiddrop-192"), BackboneShape(32, 576)).schedule()
    assert found.per_layer == (192,) * 3 + (96,) * 29


def test_with_an_exponent_of_0_no_attention_is_read() -> None:
    features, _ = drawn(0)
    stage = stage_of(SaliencyCoverage, keep=9, alpha=0)
    assert stage.vision_taps == ()
    assert stage.needs == frozenset()
    assert SaliencyCoverage.needs == {"vision_attention"}
    assert stage_of(SaliencyCoverage, keep=9).vision_taps == (-2,)
    call = replace(encode_call([features], layer_of_cls_rows(cls_rows(torch.ones(30)))), tower=_hidden, members=_hidden)
    (mask,) = stage.encode(call).keep
    chosen = greedy(features, torch.ones(30), 9)
    assert torch.equal(mask.nonzero()[:, 0], chosen.sort().values)


def _hidden(_: int) -> Any:
    raise AssertionError("a layer of the tower is read")
