"""SparseVLM+ against closed values of W, recorded counts, the published formulas written out, and the eager model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_goldens import golden, prune_call, stage_of
from tiny import IMAGE, policy, prompt, relative_error, tiny_llava
from torch import Tensor
from watching import told, watched

import dropflow
from dropflow import Entry, PruneCall
from dropflow.engine.model.attention import QueryKey
from dropflow.errors import DecisionError, PolicyError
from dropflow_sparsevlm import GravityCorrected
from dropflow_sparsevlm.gravity import best_heads, gravity, guarded
from dropflow_sparsevlm.rating import raters, relevance

SELECT = golden("sparsevlm_select")
USE = {"use": "sparsevlm/gravity-corrected"}


def rope(positions: Tensor, dims: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin (batch, tokens, dims) as transformers' `rotate_half` layout has them."""
    angles = positions[..., None] * base ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angles = torch.cat((angles, angles), -1)
    return angles.cos().float(), angles.sin().float()


def pull(distance: Any, dims: int, base: float, head_dim: int) -> Any:
    """W by the published formula, with the numbers of a head that do not turn."""
    theta = base ** (-2 * np.arange(dims // 2) / dims)
    turned = 2 * np.cos(np.asarray(distance)[..., None] * theta).sum(-1)
    return (turned + head_dim - dims) / math.sqrt(head_dim)


def test_w_has_its_closed_values() -> None:
    cos, sin = rope(torch.arange(2049)[None], 128, 1e4)
    found = gravity(cos, sin, torch.tensor([[0]]), 128)[0, 0]
    assert [round(float(found[d]), 2) for d in (0, 35, 576)] == [11.31, 6.08, 2.65]
    assert float(found[:701].min()) == pytest.approx(1.19, abs=0.005)
    assert int((found < 0).nonzero()[0]) == 1707
    assert float(found.min()) == pytest.approx(-0.32, abs=0.005)
    safe = guarded(found[None, None], 128)[0, 0]
    assert int((safe != found).nonzero()[0]) == 1109, "where the documented guard begins"
    assert float(safe.min()) == pytest.approx(0.05 * 128**0.5)
    narrow = gravity(*rope(torch.arange(1200)[None], 64, 1e4), torch.tensor([[0]]), 64)[0, 0]
    assert int((narrow < 0).nonzero()[0]) == 725
    assert int((guarded(narrow[None, None], 64)[0, 0] != narrow).nonzero()[0]) == 542
    long = gravity(*rope(torch.arange(8193)[None], 128, 1e6), torch.tensor([[0]]), 128)[0, 0]
    assert float(long.min()) == pytest.approx(1.42, abs=0.005)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 3000), min_size=2, max_size=9),
    st.sampled_from([(8, 8), (8, 16), (64, 64), (24, 80)]),
    st.sampled_from([1e4, 5e5]),
    st.integers(0, 500),
)
def test_w_follows_distance_alone(positions: list[int], dims: tuple[int, int], base: float, shift: int) -> None:
    turning, head_dim = dims
    where = torch.tensor([positions, [p + shift for p in positions]])
    rows = torch.arange(len(positions)).expand(2, -1)
    found = gravity(*rope(where, turning, base), rows, head_dim)
    expected = pull(np.subtract.outer(positions, positions), turning, base, head_dim)
    assert torch.allclose(found, torch.from_numpy(expected).float().expand(2, -1, -1), atol=2e-4)
    assert torch.allclose(found, found.mT, atol=1e-5)
    assert torch.allclose(found.diagonal(dim1=1, dim2=2), torch.tensor(head_dim**0.5))


def test_the_heads_that_see_the_picture_best_rank() -> None:
    by_head = torch.tensor([[[9.0, 1, 1], [0, 3, 1], [0, 1, 2], [0, 4, 0]]])  # the first token is text
    visual = torch.tensor([[False, True, True]])
    assert best_heads(by_head, visual, 0.5).tolist() == [[0, 3.5, 0.5]]
    assert best_heads(by_head, visual, 0.01).tolist() == [[0, 3, 1]], "ties go to the first head"
    assert best_heads(by_head, visual, 1.0).tolist() == by_head.mean(1).tolist()
    heads = torch.rand(1, 32, 5, generator=torch.Generator().manual_seed(0))
    most = heads[0, :, 1:].sum(1).topk(14).indices
    chosen = best_heads(heads, torch.arange(5)[None] > 0, GravityCorrected.Options(keep={2: 1}).heads)
    assert torch.allclose(chosen[0], heads[0, most].mean(0)), "14 of 32, as published"


def made_call(rows: Tensor, start: int, rotary: Any, head_dim: int, rate: Tensor) -> PruneCall:
    """A payload of one image before text, whose attention to it in layer 2 is `rows` (batch, heads, text, visual).

    Embeddings are such that the text tokens `rate` are raters.
    """
    batch, heads, text, images = rows.shape
    tokens = start + images + text
    whole = torch.zeros(batch, heads, tokens, tokens)
    whole[:, :, start + images :, start : start + images] = rows

    def attention(layer: int, queries: Tensor) -> Tensor:
        assert layer == 2
        return whole.gather(2, queries[:, None, :, None].expand(-1, heads, -1, tokens))

    def tapped(layer: int) -> QueryKey:
        assert layer == 2
        states = torch.zeros(batch, heads, tokens, head_dim)
        return QueryKey(states, states, None, 1.0, causal=True, rotary=rotary)

    call = prune_call(3, start, images, tokens, attention, batch)
    embeds = torch.zeros(batch, tokens, 2)
    embeds[:, start : start + images, 0] = 1
    embeds[:, start + images + rate, 0] = 5
    return replace(call, entry=Entry(embeds, call.image_id), tapped=tapped)


@pytest.mark.parametrize("target", [192, 64])
@pytest.mark.parametrize(("step", "layer"), [(0, 2), (1, 6), (2, 15)])
def test_without_turning_all_heads_choose_the_recorded_tokens(target: int, step: int, layer: int) -> None:
    start, images, text = SELECT["table/S_N_T"].tolist()
    tokens, dims = start + images + text, 16
    still = torch.ones(1, tokens, dims), torch.zeros(1, tokens, dims)
    call = made_call(SELECT["table/attn_text_rows"], start, still, dims, SELECT["table/raters"])
    count = int(SELECT[f"table/v20/{target}"][step])
    answer = stage_of(GravityCorrected, keep={3: count}, heads=1.0, reference=True).prune(call)
    kept = answer.mask[0, start : start + images].nonzero()[:, 0]
    assert kept.tolist() == SELECT[f"table/v20/{target}/layer{layer}/kept"].tolist()
    assert len(kept) == min(count, images - 1)
    assert relative_error(answer.scores[0, start : start + images] * dims**0.5, SELECT["table/score"][0]) < 2e-4


@pytest.mark.parametrize("dims", [16, 8])
@pytest.mark.parametrize("batch", [1, 2])
def test_score_and_choice_by_the_formulas_written_out(batch: int, dims: int) -> None:
    start, images, text, heads, head_dim = 3, 40, 9, 7, 16
    dice = torch.Generator().manual_seed(batch)
    rows = torch.rand(batch, heads, text, images, generator=dice) ** 4
    tokens = start + images + text
    # with gaps, as after an earlier cut, and a padded neighbour's shift
    positions = (torch.arange(tokens) * 3 // 2 + 5 * torch.arange(batch)[:, None]).expand(batch, -1)
    rate = torch.tensor([1, 4, 7])
    call = made_call(rows, start, rope(positions, dims, 1e4), head_dim, rate)
    answer = stage_of(GravityCorrected, keep={3: 12}).prune(call)
    for sample in range(batch):
        p = positions[sample].numpy()
        asks, keys = p[start + images :][rate], p[start : start + images]
        corrected = rows[sample][:, rate].numpy() / pull(np.subtract.outer(asks, keys), dims, 1e4, head_dim)
        best = np.argsort(-corrected.sum((1, 2)))[:3]  # 14 of 32 of seven heads
        expected = corrected[best].mean((0, 1))
        assert relative_error(answer.scores[sample, start : start + images], torch.from_numpy(expected).float()) < 1e-5
        kept = answer.mask[sample, start : start + images].nonzero()[:, 0].tolist()
        assert kept == sorted(np.argsort(-expected)[:12].tolist())


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_the_corrected_rows_of_the_eager_model(side: str) -> None:
    inputs = prompt([(3, "I", 5), ("I", 2, "I", 9)], side=side)
    model, eager = tiny_llava(), tiny_llava(attention="eager")
    embeds: list[Tensor] = []
    model.get_decoder().register_forward_pre_hook(
        lambda _, __, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with dropflow.attach(model, watched(sparse=USE | {"keep": {2: 6}})) as flow:
        model(**inputs)
    event = next(event for event in told(flow) if event.boundary == 2)
    attention = eager(**inputs, output_attentions=True).attentions[1]
    for sample, own in enumerate(inputs["input_ids"] == IMAGE):
        visual = own.nonzero()[:, 0]
        text = ((~own) & inputs["attention_mask"][sample].bool() & (torch.arange(len(own)) > visual[0])).nonzero()[:, 0]
        rate = text[raters(relevance(embeds[0][sample, visual], embeds[0][sample, text]))]
        w = pull((rate[:, None] - torch.arange(len(own))).numpy(), 8, 1e4, 8)
        corrected = attention[sample][:, rate] / torch.from_numpy(w).clamp(min=0.05 * 8**0.5)
        best = corrected[..., visual].sum((1, 2)).topk(2).indices  # 14 of 32 of four heads
        expected = corrected[best].mean((0, 1))
        scores = torch.zeros(len(own)).scatter(0, event.index[sample], event.scores["sparse"][sample])
        assert relative_error(scores[visual], expected[visual].float()) < 1e-5
        for image in visual.split(16):
            kept = image[expected[image].topk(6).indices].sort().values
            assert event.live[sample, image].nonzero()[:, 0].tolist() == (kept - image[0]).tolist()


@torch.no_grad()
@pytest.mark.parametrize("reference", [True, False])
def test_as_released_one_token_goes_at_each_boundary_whatever_the_table(reference: bool) -> None:
    model = tiny_llava()
    options = {"keep": {2: 16, 3: 16, 5: 16}, "reference": reference}
    with dropflow.attach(model, policy(sparse=USE | options)) as flow:
        model(**prompt())
        expected = (16, 16, 15, 14, 14, 13) if reference else (16,) * 6
        assert flow.plan.schedule().per_layer == expected
        live = flow.live()
    visual = prompt()["input_ids"] == IMAGE
    own = [int(n) for n in (live[:, 1] & visual[1]).sum(1)]
    assert own == [2 * n for n in expected], "each of two images loses its own"


@torch.no_grad()
def test_at_long_distances_no_score_changes_its_sign() -> None:
    start, images, text = 0, 30, 4
    far = torch.cat((torch.arange(images), 1707 + torch.arange(text)))[None]
    rows = torch.full((1, 2, text, images), 0.01)
    call = made_call(rows, start, rope(far, 128, 1e4), 128, torch.tensor([3]))
    assert (gravity(*call.rotary(2), torch.tensor([[33]]), 128) < 0).any(), "W itself does change it here"
    scores = stage_of(GravityCorrected, keep={3: 5}).prune(call).scores[0, :images]
    assert bool((scores > 0).all())
    assert float(scores.max()) <= 0.01 / (0.05 * 128**0.5) * (1 + 1e-5)


@torch.no_grad()
def test_as_released_attention_is_divided_by_w_whatever_its_sign() -> None:
    images, text = 30, 4
    far = torch.cat((torch.arange(images), 1715 + torch.arange(text)))[None]
    rows = torch.full((1, 2, text, images), 0.01)
    call = made_call(rows, 0, rope(far, 128, 1e4), 128, torch.tensor([3]))
    answer = stage_of(GravityCorrected, keep={3: 5}, reference=True).prune(call)
    expected = 0.01 / pull(1718 - np.arange(images), 128, 1e4, 128)
    assert (expected < 0).any(), "the sign has not changed at any of these distances"
    assert relative_error(answer.scores[0, :images], torch.from_numpy(expected).float()) < 1e-3
    kept = answer.mask[0, :images].nonzero()[:, 0].tolist()
    assert kept == sorted(np.argsort(-expected)[:5].tolist())
    held = stage_of(GravityCorrected, keep={3: 5}).prune(call)
    assert kept != held.mask[0, :images].nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    "given", [None, torch.zeros(1, 35, 8), (torch.zeros(3, 1, 35, 8),) * 2], ids=["none", "complex", "stacked"]
)
def test_what_is_no_cos_and_sin_is_refused(given: Any) -> None:
    call = made_call(torch.rand(1, 2, 4, 30), 1, given, 8, torch.tensor([0]))
    with pytest.raises(DecisionError, match=r"layer 2: expected cos and sin of shape \(batch, tokens, dims\)"):
        stage_of(GravityCorrected, keep={3: 5}).prune(call)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"stages\.s\.keep: field required"),
        ({"keep": {0: 3}}, r"stages\.s\.keep: boundary 0 is ranked by the attention of layer -1"),
        ({"keep": {2: 4, 4: 9}}, r"keeps 9 visual tokens, more than the 4 left by stages\.s\.keep\.2"),
        ({"keep": {2: 4}, "heads": 14}, r"stages\.s\.heads: .*less than or equal to 1"),
    ],
)
def test_faults_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        dropflow.attach(tiny_llava(), policy(s=USE | options))


@pytest.mark.parametrize(
    "doubtful",
    [{"layer_types": ["sliding_attention", "full_attention"] * 3}, {"no_rope_layers": [1, 1, 1, 0, 1, 1]}],
    ids=["kinds of layers under one RoPE", "layers without positions"],
)
def test_a_decoder_whose_layers_may_not_turn_alike_is_refused(doubtful: dict[str, Any]) -> None:
    model = tiny_llava()
    for name, value in doubtful.items():
        setattr(model.get_decoder().config, name, value)
    with pytest.raises(PolicyError, match=r"stages\.s: needs rotary, which the adapter Llava cannot give"):
        dropflow.attach(model, policy(s=USE | {"keep": {2: 4}}))
