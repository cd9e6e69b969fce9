"""SparseVLM against recorded raters, selections and clusters of the published code, and against its rules."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_goldens import golden, prune_call, stage_of
from tiny import IMAGE, policy, prompt, relative_error, tiny_llava
from watching import told, watched

import dropflow
from dropflow import Entry, PruneCall
from dropflow.errors import PolicyError
from dropflow.operators import density_peaks
from dropflow.operators.merging import mean_into
from dropflow.policy.plan import resolve
from dropflow.testing import MaskedOracle, assert_stage_conforms, tiny_models
from dropflow.units import BackboneShape
from dropflow_sparsevlm import TextGuided
from dropflow_sparsevlm.rating import adaptive_count, raters, relevance
from dropflow_sparsevlm.survivors import recycled

RATERS, SELECT, RECYCLE = (golden(f"sparsevlm_{name}") for name in ("raters", "select", "recycle"))


@pytest.mark.parametrize("case", ["a", "b"])
def test_raters_are_the_recorded_ones(case: str) -> None:
    start, images, _ = RATERS[f"{case}/S_N_T"].tolist()
    embeds = RATERS[f"{case}/embeds"][0]
    found = relevance(embeds[start : start + images], embeds[start + images :])
    assert relative_error(found, RATERS[f"{case}/score"][0]) < 2e-4
    assert raters(found).nonzero()[:, 0].tolist() == RATERS[f"{case}/raters"].tolist()


def test_a_single_text_token_rates() -> None:
    """The released code finds no rater there, and keeps an arbitrary subset by scores that are no numbers."""
    start, images, _ = RATERS["c_one_text/S_N_T"].tolist()
    embeds = RATERS["c_one_text/embeds"][0]
    found = relevance(embeds[start : start + images], embeds[start + images :])
    assert found.tolist() == pytest.approx(RATERS["c_one_text/score"][0].tolist()) == [1.0]
    assert RATERS["c_one_text/raters"].numel() == 0
    assert raters(found).tolist() == [True]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 99))
def test_relevance_sums_to_one_and_follows_the_text(visual: int, text: int, seed: int) -> None:
    dice = torch.Generator().manual_seed(seed)
    images, words = torch.randn(visual, 6, generator=dice), torch.randn(text, 6, generator=dice)
    found = relevance(images, words)
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(relevance(images.flip(0), words), found, atol=1e-6)
    assert torch.allclose(relevance(images, words.flip(0)), found.flip(0), atol=1e-6)
    assert raters(found).any()


def recorded_call(case: str, layer: int) -> tuple[PruneCall, slice]:
    """A payload with the recorded attention of the text rows; embeddings make the recorded raters rate."""
    rows, rate = SELECT[f"{case}/attn_text_rows"], SELECT[f"{case}/raters"]
    heads, text, images = rows.shape[1:]
    start = 6
    tokens = start + images + text
    whole = torch.zeros(1, heads, tokens, tokens)
    whole[:, :, start + images :, start : start + images] = rows

    def attention(asked: int, queries: torch.Tensor) -> torch.Tensor:
        assert asked == layer
        return whole[:, :, queries[0]]

    call = prune_call(layer + 1, start, images, tokens, attention)
    embeds = torch.zeros(1, tokens, 2)
    embeds[0, start : start + images, 0] = 1
    embeds[0, start + images + rate, 0] = 5
    return replace(call, entry=Entry(embeds, call.image_id)), slice(start, start + images)


@pytest.mark.parametrize(("table", "target"), [("v15", 192), ("v15", 64), ("v20", 192), ("v20", 64)])
@pytest.mark.parametrize(("step", "layer"), [(0, 2), (1, 6), (2, 15)])
def test_survivors_by_table_are_the_recorded_ones(table: str, target: int, step: int, layer: int) -> None:
    count = int(SELECT[f"table/{table}/{target}"][step])
    call, visual = recorded_call("table", layer)
    answer = stage_of(TextGuided, keep={layer + 1: count}, recycle=False, reference=True).prune(call)
    assert (
        answer.mask[0, visual].nonzero()[:, 0].tolist() == SELECT[f"table/{table}/{target}/layer{layer}/kept"].tolist()
    )
    assert relative_error(answer.scores[0, visual], SELECT["table/score"][0]) < 2e-4
    assert answer.merge_into is None


def test_as_released_at_least_one_token_goes() -> None:
    call, visual = recorded_call("table", 2)
    call = replace(call, image_id=torch.where(call.index < visual.start + 50, call.image_id, -1), image_sizes=(50,))
    kept = {}
    for reference in (True, False):
        stage = stage_of(TextGuided, keep={3: 300}, recycle=False, reference=reference)
        kept[reference] = stage.prune(call).mask[0, visual][:50].nonzero()[:, 0].tolist()
    assert kept[True] == SELECT["table/v15/192/layer2/N50_first50/kept"].tolist()
    assert kept[False] == list(range(50)), "a budget beyond what is there drops nothing"


@pytest.mark.parametrize("case", ["a", "b", "c", "d_lowrank", "e_rank_eq_N"])
def test_survivors_by_rank_are_the_recorded_ones(case: str) -> None:
    call, visual = recorded_call(f"rank/{case}", 2)
    scale, bias = SELECT[f"rank/{case}/scale_bias"].tolist()
    rank = {"at": [3], "scale": scale, "bias": bias}
    answer = stage_of(TextGuided, rank=rank, recycle=False, reference=True).prune(call)
    assert answer.mask[0, visual].nonzero()[:, 0].tolist() == SELECT[f"rank/{case}/kept"].tolist()
    assert relative_error(answer.scores[0, visual], SELECT[f"rank/{case}/score"][0]) < 2e-4


def test_the_adaptive_count_is_by_rank() -> None:
    rows = torch.rand(4, 10, generator=torch.Generator().manual_seed(0))
    assert adaptive_count(rows, 2, 1, most=10) == 9
    assert adaptive_count(torch.cat((rows, rows)), 2, 1, most=10) == 9, "rows that say the same raise no rank"
    assert adaptive_count(rows, 20, 0, most=7) == 7
    assert adaptive_count(rows, 1, -9, most=10) == 0
    assert adaptive_count(rows[:, :4], 0.1, 0, most=3) == 4, "full rank: nothing goes"


@pytest.mark.parametrize("case", ["a_83_9", "b_33_4", "c_5_1", "d_29_3_blobs", "e_batch2"])
@pytest.mark.parametrize("noisy", [False, True])
def test_clusters_are_the_recorded_ones(case: str, noisy: bool) -> None:
    count = int(RECYCLE[f"{case}/k"])
    expected = RECYCLE[f"{case}/merged_noise" if noisy else f"{case}/merged_no_noise"]
    for sample, states in enumerate(RECYCLE[f"{case}/x"]):
        noise = 1e-6 * RECYCLE[f"{case}/noise01"][sample] if noisy else None
        centres, cluster = density_peaks(states, count, count, noise)
        merged = mean_into(states[None], centres[cluster][None])[0, centres]
        assert relative_error(merged, expected[sample]) < 2e-4
        assert torch.equal(cluster[centres], torch.arange(count))


def test_copies_of_one_token_share_a_cluster() -> None:
    """Ties fall in token order, so that no second copy becomes a centre; the released code leaves it to noise."""
    states = RECYCLE["f_duplicates/x"][0]
    count = int(RECYCLE["f_duplicates/k"])
    centres, cluster = density_peaks(states, count, count)
    copies = (states[:, None] == states[None]).all(-1)
    assert (copies.sum(1) > 1).any()
    assert not copies[centres][:, centres].fill_diagonal_(False).any()
    assert (cluster[:, None] == cluster[None])[copies].all()


def test_counts_of_recycled_tokens_and_clusters_are_the_recorded_ones() -> None:
    dropped = RECYCLE["count/dropped"].tolist()
    expected = list(zip(RECYCLE["count/recycled"].tolist(), RECYCLE["count/clusters"].tolist(), strict=True))
    assert [recycled(number) for number in dropped] == expected
    assert recycled(0) == (0, 0)
    assert recycled(5, 1.0, 1) == (5, 5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(2, 30), st.integers(0, 99), st.data())
def test_clusters_by_the_formula_written_out(tokens: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, tokens))
    states = torch.randn(tokens, 4, generator=torch.Generator().manual_seed(seed))
    points = states.tolist()
    away = [[math.dist(a, b) / 2 for b in points] for a in points]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in away]
    apart = []
    for i, row in enumerate(away):
        higher = [row[j] for j in range(tokens) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        apart.append(min(higher) if higher else max(map(max, away)))
    best = sorted(range(tokens), key=lambda i: -density[i] * apart[i])[:count]
    centres, cluster = density_peaks(states, count, count)
    assert centres.tolist() == best
    for i, row in enumerate(away):
        assert cluster[i] == (best.index(i) if i in best else min(range(count), key=lambda c: row[best[c]]))


RECYCLING = {"use": "sparsevlm/text-guided", "keep": {2: 6, 4: 2}, "recycle_share": 0.7, "cluster_size": 3}


@torch.no_grad()
def test_a_run_with_clusters_equals_the_masked_run_that_merges(llava: Any) -> None:
    inputs = prompt()
    with dropflow.attach(llava, policy(sparse=RECYCLING)) as flow:
        logits = llava(**inputs).logits
        live, merges = flow.live(), flow.merges()
    assert set(merges) == {2, 4}
    with MaskedOracle(llava, live, merges=merges):
        expected = llava(**inputs, use_cache=False).logits
    with MaskedOracle(llava, live):
        unmerged = llava(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    assert relative_error(logits[real], expected[real]) < 1e-5
    assert relative_error(logits[real], unmerged[real]) > 1e-3, "merging changed nothing, so nothing was compared"
    visual = inputs["input_ids"] == IMAGE
    # 10 go: 8 of them make 3 clusters; then 7 of 9 go: 5 of them make 2
    assert [int(own[0, visual[0]].sum()) for own in live] == [16, 16, 9, 9, 4, 4]
    assert [int(own[1, visual[1]].sum()) for own in live] == [32, 32, 18, 18, 8, 8]
    assert bool((live[:, 2].sum(1) == 5).all())
    for boundary, into in merges.items():
        moved = (into != torch.arange(into.shape[1])) & visual
        targets = into[moved]
        assert moved.any()
        assert not (live[boundary] & moved).any(), "what was merged into another is gone"
        assert bool(live[boundary][moved.nonzero()[:, 0], targets].all())


@torch.no_grad()
def test_forecast_counts_survivors_and_clusters(llava: Any) -> None:
    with dropflow.attach(llava, policy(sparse=RECYCLING)) as flow:
        assert flow.plan.schedule().per_layer == (16, 16, 9, 9, 4, 4)
        llava(**prompt([(3, "I", 5)]))
        assert [layer.visual_tokens for layer in flow.report().layers] == [16, 16, 9, 9, 4, 4]
    by_rank = policy(sparse={"use": "sparsevlm/text-guided", "rank": {"at": [2], "scale": 2.0}})
    assert resolve(dropflow.load_policy(by_rank), BackboneShape(6, 16)).schedule().per_layer == (
        16,
        16,
        None,
        None,
        None,
        None,
    )


def test_the_adaptive_number_keeps_the_guarantees() -> None:
    options = {"rank": {"at": [0.35, 0.7], "scale": 1.5, "bias": 1.0}, "recycle_share": 0.6, "cluster_size": 2}
    (cell,) = assert_stage_conforms("sparsevlm/text-guided", options, {"llava": tiny_models()["llava"]})
    assert cell.outcome == "run"


@torch.no_grad()
def test_scores_are_the_raters_rows_of_the_eager_model() -> None:
    inputs = prompt([(3, "I", 5)])
    model, eager = tiny_llava(), tiny_llava(attention="eager")
    embeds: list[torch.Tensor] = []
    model.get_decoder().register_forward_pre_hook(
        lambda _, __, kwargs: embeds.append(kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    with dropflow.attach(model, watched(sparse=RECYCLING | {"keep": {2: 6}})) as flow:
        model(**inputs)
    (scores,) = (event.scores["sparse"] for event in told(flow) if event.scores)
    rate = raters(relevance(embeds[0][4:20], embeds[0][20:]))
    assert 0 < rate.sum() < 5
    expected = eager(**inputs, output_attentions=True).attentions[1][0, :, 20:][:, rate].mean((0, 1))
    assert relative_error(scores[0, 4:20], expected[4:20]) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"stages\.s: expected either `keep` .* or `rank`"),
        ({"keep": {2: 3}, "rank": {"at": [2], "scale": 1.0}}, r"stages\.s: expected either `keep`"),
        ({"keep": {0: 3}}, r"stages\.s\.keep: boundary 0 is ranked by the attention of layer -1"),
        ({"rank": {"at": [3, 3], "scale": 1.0}}, r"stages\.s\.rank\.at: boundary 3 is named twice"),
        ({"keep": {2: 30}}, r"keeps 30 visual tokens, more than the 16"),
        ({"keep": {2: 4, 4: 9}}, r"keeps 9 visual tokens, more than the 5 left by stages\.s\.keep\.2"),
    ],
)
def test_faults_are_named(llava: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        dropflow.attach(llava, policy(s={"use": "sparsevlm/text-guided"} | options))
