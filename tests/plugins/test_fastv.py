"""FastV against recorded rankings of the published code, and against its rule stated anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_goldens import golden, prune_call, stage_of
from tiny import IMAGE, policy, prompt, relative_error, tiny_llava
from transformers import DynamicCache

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.errors import PolicyError
from dropflow.units import Budget
from dropflow_fastv import AttentionRank

RANK = golden("fastv_rank")
FASTV = {"use": "fastv/attention-rank", "at": 2, "keep": 5}


def decided(case: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the stage keeps (batch, tokens) and its scores, given the recorded last attention row."""
    row = RANK[f"{case}/attn"]  # (batch, heads, keys)
    start, images, tokens = RANK[f"{case}/start_len_n"].tolist()
    asked: list[int] = []

    def attention(layer: int, rows: torch.Tensor) -> torch.Tensor:
        asked.append(layer)
        assert (rows == tokens - 1).all()
        return row[:, :, None]

    stage = stage_of(AttentionRank, visual_tokens=images, at=2, **options)
    assert stage.taps == (1,)
    keep = stage.prune(prune_call(2, start, images, tokens, attention, len(row)))
    assert asked == [1]
    visual = torch.arange(tokens).ge(start) & torch.arange(tokens).lt(start + images)
    return keep.mask | ~visual, keep.scores


@pytest.mark.parametrize("count", [30, 20, 10, 5, 1, 40])
def test_kept_indices_are_the_recorded_ones(count: int) -> None:
    keep, scores = decided("a", keep=count)
    assert keep[0].nonzero()[:, 0].tolist() == RANK[f"a/k{count}/keep_sorted"].tolist()
    start, images, _ = RANK["a/start_len_n"].tolist()
    assert relative_error(scores[0, start : start + images], RANK["a/score"]) < 1e-6
    order = scores[0, start : start + images].topk(count).indices + start
    assert order.tolist() == RANK[f"a/k{count}/top_desc"].tolist()


def test_each_sample_of_a_batch_is_ranked_by_its_own_attention() -> None:
    keep, _ = decided("b_batch2", keep=9)
    assert keep[0].nonzero()[:, 0].tolist() == RANK["b_batch2/k9/keep_sorted"].tolist()
    assert not torch.equal(keep[0], keep[1]), "the released code gives every sample the choice of the first"


@pytest.mark.parametrize("dropped", [0.25, 0.5, 0.75, 0.9, 0.3333])
def test_shares_round_as_the_code_for_transformers_does(dropped: float) -> None:
    keep, _ = decided("hf", keep=1 - dropped, rounding="half_even")
    assert keep[0].nonzero()[:, 0].tolist() == RANK[f"hf/r{dropped:.4f}/keep_sorted"].tolist()


def test_counts_are_those_of_both_released_roundings() -> None:
    for i, tokens in enumerate(RANK["count/N"].tolist()):
        for j, dropped in enumerate(RANK["count/R"].tolist()):
            nearest, floor = (Budget(share=1 - dropped, rounding=how).of(tokens) for how in ("half_even", "floor"))  # type: ignore[arg-type]
            assert nearest == RANK["count/hf_round_N_times_1_minus_R"][i, j]
            assert floor == RANK["count/lmms_int_N_times_keep"][i, j]
            assert abs(Budget(share=1 - dropped).of(tokens) - tokens * (1 - dropped)) <= 0.5 + 1e-9


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(0, 5), st.integers(1, 6), st.integers(1, 4), st.data())
def test_any_ranking_follows_the_rule(images: int, before: int, after: int, heads: int, data: st.DataObject) -> None:
    """Mean over heads of the last row, the k largest, in order; heads may be permuted and the row scaled (F2 - F4)."""
    tokens, count = before + images + after, data.draw(st.integers(0, images))
    row = torch.rand(1, heads, 1, tokens, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    kept = []
    for weights in (row, row[:, torch.randperm(heads)] * 3):
        call = prune_call(2, before, images, tokens, lambda *_, weights=weights: weights)
        kept.append(stage_of(AttentionRank, visual_tokens=images, keep=count).prune(call).mask)
    best = sorted(range(images), key=lambda j: -float(row[0, :, 0, before + j].double().mean()))[:count]
    assert kept[0][0, before : before + images].nonzero()[:, 0].tolist() == sorted(best)
    assert torch.equal(kept[0], kept[1])
    wider = stage_of(AttentionRank, visual_tokens=images, keep=min(count + 1, images))
    assert bool((wider.prune(prune_call(2, before, images, tokens, lambda *_: row)).mask | ~kept[0]).all())


@pytest.mark.parametrize("text", ["llama", "mistral"])
@torch.no_grad()
def test_the_ranking_row_is_the_eager_models(text: str) -> None:
    inputs = prompt([(3, "I", 5)])
    with dropflow.attach(tiny_llava(text=text), policy(fastv=FASTV)) as flow:
        flow._hooks.backbone.model(**inputs)
        kept = flow.live()[2, 0, 4:20].nonzero()[:, 0].tolist()
    eager = tiny_llava(text=text, attention="eager")
    expected = eager(**inputs, output_attentions=True).attentions[1][0, :, -1, 4:20].mean(0)
    assert kept == sorted(expected.topk(5).indices.tolist())


@torch.no_grad()
def test_caches_and_positions_behind_the_boundary(llava: Any) -> None:
    """F6: n entries before K, the survivors after, one more per step; positions are the original ones."""
    seen: list[list[int]] = []
    layer = llava.get_decoder()._modules["layers"][2]
    handle = layer.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
    )
    inputs, cache = prompt([(3, "I", 5)]), DynamicCache()
    with dropflow.attach(llava, policy(fastv=FASTV)) as flow:
        llava(**inputs, **{CACHE_ARGUMENT: cache})
        live = flow.live()[2, 0].nonzero()[:, 0].tolist()
        lengths = [held.keys.shape[-2] for held in cache.layers]
        more = {"attention_mask": torch.ones(1, 26, dtype=torch.long), CACHE_ARGUMENT: cache}
        llava(input_ids=torch.tensor([[7]]), **more)
    handle.remove()
    assert lengths == [25] * 2 + [14] * 4
    assert [held.keys.shape[-2] for held in cache.layers] == [26] * 2 + [15] * 4
    assert seen == [live, [25]]


@torch.no_grad()
def test_keeping_every_token_is_the_dense_model(llava: Any) -> None:
    inputs = prompt()
    with dropflow.attach(llava, policy(fastv=FASTV | {"keep": 16})):
        flowing = llava(**inputs).logits
    assert torch.equal(flowing, llava(**inputs).logits)


@torch.no_grad()
def test_several_images_each_keep_their_share(llava: Any) -> None:
    inputs = prompt([("I", 2, "I", 9)])
    with dropflow.attach(llava, policy(fastv=FASTV)) as flow:
        llava(**inputs)
        own = flow.live()[2, 0][inputs["input_ids"][0] == IMAGE]
    assert (own[:16].sum(), own[16:].sum()) == (5, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": 0}, r"stages\.f\.at: boundary 0 is ranked by the attention of layer -1.* from 1 to 5"),
        ({"at": 2, "rounding": "up"}, r"stages\.f\.rounding"),
        ({"at": 2, "keep": 17}, r"stages\.f\.keep.*keeps 17 visual tokens, more than the 16"),
    ],
)
def test_faults_are_named(llava: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        dropflow.attach(llava, policy(f={"use": "fastv/attention-rank"} | options))
