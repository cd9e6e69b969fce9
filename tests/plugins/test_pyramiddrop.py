"""PyramidDrop against recorded rankings of the published code, through the engine, and against its rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_goldens import Runs, golden, recorded_llama
from tiny import policy, prompt, relative_error, tiny_llava
from transformers import DynamicCache
from watching import told, watched

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.units import Budget

RECORD = golden("pdrop_rank")
ONE_SHARE = ("inf_stage0", "inf_odd_ratio", "inf_batch2_padded", "inf_text_only_row", "train_two_turns")


def recorded_layer() -> Any:
    """A model whose first layer ranks with the recorded norm, q and k, so that boundary 0 is the recorded boundary."""
    layer = "model.layers.0."
    names = {"q": "self_attn.q_proj.weight", "k": "self_attn.k_proj.weight", "norm": "input_layernorm.weight"}
    weights = {layer + name: RECORD[f"w/{key}"] for key, name in names.items()}
    return recorded_llama(32, int(RECORD["heads"]), weights, layers=2, intermediate_size=16, vocab_size=24)


@torch.no_grad()
def run(case: str, keep: float | int) -> tuple[Any, list[list[int]]]:
    """The live set after the recorded boundary, the scores, and the position ids that the layer gets."""
    features = RECORD[f"{case}/features"]
    batch, tokens = features.shape[:2]
    images = RECORD[f"{case}/image_tokens"].tolist()
    ratios, stage = RECORD[f"{case}/ratios"].tolist(), int(RECORD[f"{case}/stage"])
    visual = torch.zeros(batch, tokens, dtype=torch.bool)
    for sample, start in enumerate(RECORD[f"{case}/image_start"].tolist()):
        now = int(images[sample] * ratios[stage])
        visual[sample, start : start + now] = start >= 0
    mask = RECORD.get(f"{case}/mask", torch.ones(batch, tokens, dtype=torch.long))
    labels = {"labels": RECORD[f"{case}/labels"].clamp(max=23)} if f"{case}/labels" in RECORD else {}
    model, seen = recorded_layer(), []
    handle = (
        model.get_decoder()
        ._modules["layers"][0]
        .register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["position_ids"].tolist()), with_kwargs=True)
    )
    pyramid = {"use": "pyramiddrop/pyramid", "keep": {0: keep}}
    with (
        dropflow.attach(model, watched(pyramid=pyramid) | {"positions": "compact"}, adapter=Runs) as flow,
        flow.visual(visual),
    ):
        model(inputs_embeds=features, attention_mask=mask, **labels)
        event = told(flow)[-1]
    handle.remove()
    return (visual, mask.bool(), event), seen[0]


@pytest.mark.parametrize("case", [*ONE_SHARE, "inf_stage1"])
def test_survivors_scores_and_positions_are_the_recorded_ones(case: str) -> None:
    stage, ratios = int(RECORD[f"{case}/stage"]), RECORD[f"{case}/ratios"].tolist()
    keep = ratios[stage + 1] if stage == 0 else int(RECORD[f"{case}/image_tokens"][0] * ratios[stage + 1])
    (visual, real, event), positions = run(case, keep)
    ranked = 0
    for sample, own in enumerate(visual):
        if f"{case}/kept{sample}" not in RECORD and case != "inf_text_only_row":
            continue
        if not own.any():
            assert torch.equal(event.live[sample], real[sample])
            continue
        record = 0 if case == "inf_text_only_row" else sample
        assert event.live[sample, own].nonzero()[:, 0].tolist() == RECORD[f"{case}/kept{record}"].tolist()
        assert relative_error(event.scores["pyramid"][sample, own], RECORD[f"{case}/score{record}"]) < 2e-4
        count = int(event.live[sample].sum())
        assert positions[sample][-count:] == list(range(count)), "renumbered without gaps"
        ranked += 1
    assert ranked


def test_a_sample_without_an_answer_is_not_pruned() -> None:
    (_, real, event), _ = run("train_no_answer", 0.5)
    assert torch.equal(event.live, real)


def test_counts_are_the_released_ones() -> None:
    for tokens, expected in zip(RECORD["count/N"].tolist(), RECORD["count/keep"].tolist(), strict=True):
        assert [Budget(share=share, rounding="floor").of(tokens) for share in (0.5, 0.25, 0.125)] == expected


@torch.no_grad()
def test_cache_lengths_and_decode_positions(llava: Any) -> None:
    """P6: with compact positions a generated token stands, in every layer, at the length of that layer's cache."""
    seen: list[int] = []
    layers = llava.get_decoder()._modules["layers"]
    handles = [
        layer.register_forward_pre_hook(
            lambda _, __, kwargs: seen.append(int(kwargs["position_ids"][0, -1])), with_kwargs=True
        )
        for layer in layers
    ]
    inputs, cache = prompt([(3, "I", 5)]), DynamicCache()
    pyramid = {"use": "pyramiddrop/pyramid", "keep": {2: 0.5, 3: 0.25, 5: 0.125}}
    with dropflow.attach(llava, policy(pyramid=pyramid) | {"positions": "compact"}):
        llava(**inputs, **{CACHE_ARGUMENT: cache})
        lengths = [held.keys.shape[-2] for held in cache.layers]
        seen.clear()
        more = {"attention_mask": torch.ones(1, 26, dtype=torch.long), CACHE_ARGUMENT: cache}
        llava(input_ids=torch.tensor([[7]]), **more)
    for handle in handles:
        handle.remove()
    assert lengths == seen == [25, 25, 17, 13, 13, 11]


SHARES = st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3).map(lambda found: sorted(found, reverse=True))
MODEL: list[Any] = []


@settings(max_examples=15, deadline=None, derandomize=True)
@given(SHARES)
@torch.no_grad()
def test_any_shares_are_cumulative_nested_and_of_the_tokens_at_entry(shares: list[float]) -> None:
    if not MODEL:
        MODEL.append(tiny_llava())
    inputs = prompt([(3, "I", 5)])
    keep = dict(zip((1, 3, 4), shares, strict=True))
    with dropflow.attach(MODEL[0], policy(pyramid={"use": "pyramiddrop/pyramid", "keep": keep})) as flow:
        MODEL[0](**inputs)
        live = flow.live()[:, 0]
    expected = [16, *(int(16 * shares[i]) for i in (0, 0, 1, 2, 2))]
    assert live[:, 4:20].sum(1).tolist() == expected
    assert bool((live[:-1] | ~live[1:]).all())
    assert bool(live[:, :4].all())
    assert bool(live[:, 20:].all())


@torch.no_grad()
def test_shares_of_one_are_the_dense_model(llava: Any) -> None:
    inputs = prompt()
    pyramid = {"use": "pyramiddrop/pyramid", "keep": {1: 1.0, 3: 1.0}}
    with dropflow.attach(llava, policy(pyramid=pyramid) | {"positions": "compact"}):
        flowing = llava(**inputs).logits
    assert torch.equal(flowing, llava(**inputs).logits)


@torch.no_grad()
def test_by_default_it_halves_at_every_quarter_of_the_depth() -> None:
    model, inputs = tiny_llava(layers=8), prompt([(3, "I", 5)])
    with dropflow.attach(model, policy(pyramid={"use": "pyramiddrop/pyramid"})) as flow:
        model(**inputs)
        visual = [layer.visual_tokens for layer in flow.report().layers]
    assert visual == [16, 16, 8, 8, 4, 4, 2, 2]
