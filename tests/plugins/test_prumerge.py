"""PruMerge and PruMerge+: recorded reductions, the staircase of budgets, and what the published code got wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_goldens import FEW, recorded
from tiny import IMAGE, policy, prompt, relative_error, tiny_llava

import dropflow
from dropflow.engine.model.attention import QueryKey
from dropflow.engine.vision.tower_layer import TowerLayer
from dropflow.errors import PolicyError
from dropflow.operators.selection import top
from dropflow.testing import tiny_models
from dropflow_prumerge.outliers import grid_step, left_over, merge_neighbours, outliers, with_grid

STAGE = {"use": "prumerge/prune-merge"}


def single_headed(golden: dict[str, Any], image: int) -> torch.Tensor:
    """Scores from the recorded q of CLS and keys, split into two heads as a tower has them."""
    query = golden["q_cls"][image].unflatten(0, (2, 1, -1))
    keys = golden["keys_with_cls"][image].unflatten(1, (2, -1)).transpose(0, 1)
    layer = QueryKey(query[None], keys[None], None, scaling=1.0, causal=False)
    return TowerLayer((layer,), (len(keys[0]) - 1,), 1).cls(joined=True)[1:]


def reduced(golden: dict[str, Any], image: int, kept: torch.Tensor) -> torch.Tensor:
    features, keys, scores = golden["features"][image], golden["keys_with_cls"][image][1:], golden["cls_attn"][image]
    merged = merge_neighbours(features, keys, scores, kept, 32)
    return torch.cat((merged, left_over(features, scores, kept)))


@pytest.mark.parametrize("case", recorded("prumerge_small"))
def test_recorded_reductions(case: str) -> None:
    golden = recorded("prumerge_small")[case]
    if "adaptive" in case:
        assert outliers(golden["cls_attn"].flatten(), 1.5) / golden["cls_attn"].numel() == golden["reduction_ratio"]
    count = int(64 * golden["reduction_ratio"])
    for image, scores in enumerate(golden["cls_attn"]):
        assert relative_error(single_headed(golden, image), scores) < 2e-5
        kept = top(scores, count)
        assert torch.equal(kept, golden["idx"][image])
        assert relative_error(reduced(golden, image, kept), golden["out"][image]) < 2e-5


@pytest.mark.parametrize("case", recorded("prumerge_plus"))
def test_recorded_reductions_with_a_grid(case: str) -> None:
    golden = recorded("prumerge_plus")[case]
    scores = golden["cls_attn"][0]
    count = outliers(scores, 1.5)
    assert count / 576 == golden["reduction_ratio"]
    kept = with_grid(top(scores, count), 576, first=0, step=grid_step(576, count))
    assert torch.equal(kept, golden["idx"][0])
    assert relative_error(reduced(golden, 0, kept), golden["out"][0]) < 2e-5


def test_recorded_tables() -> None:
    table = recorded("prumerge_tables")[""]
    assert outliers(table["iqr_values"], 1.5) / 40 == table["iqr_ratio"]
    for count, kept, _, step, samples in table["plus_schedule"].tolist():
        assert (count, step) == (kept, grid_step(576, count))
        assert len(with_grid(torch.zeros(0, dtype=torch.long), 576, first=0, step=step)) == samples


@FEW
@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 40))
def test_merging_is_the_formulas(seed: int, patches: int, neighbours: int) -> None:
    dice = torch.Generator().manual_seed(seed)
    features, keys = torch.randn(patches, 3, generator=dice), torch.randn(patches, 4, generator=dice)
    scores = torch.rand(patches, generator=dice)
    kept = top(scores, patches // 2 + 1)
    merged = merge_neighbours(features, keys, scores, kept, neighbours)
    for row, own in zip(merged, kept.tolist(), strict=True):
        others = [i for i in range(patches) if i != own]
        cosines = torch.nn.functional.cosine_similarity(keys[own], keys[others], dim=1)
        near = [others[i] for i in cosines.argsort(descending=True)[:neighbours].tolist()]
        expected = features[own] + sum(scores[i] * features[i] for i in near)
        assert relative_error(row, expected) < 1e-4
    rest = [i for i in range(patches) if i not in kept.tolist()]
    extra = left_over(features, scores, kept)
    assert len(extra) == bool(rest)
    if rest:
        assert relative_error(extra[0], sum((scores[i] * features[i] for i in rest), torch.zeros(3))) < 1e-4


@FEW
@given(st.integers(0, 10**6), st.floats(0.1, 100), st.floats(-10, 10))
def test_outliers_forget_scale_and_offset_and_are_a_quarter_at_most(seed: int, scale: float, offset: float) -> None:
    scores = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).exp()
    low, high = scores.quantile(0.25), scores.quantile(0.75)
    expected = int((scores > high + 1.5 * (high - low)).sum())
    assert outliers(scores, 1.5) == expected == outliers(scores * scale + offset, 1.5) <= 50


def kept_numbers(model: Any, inputs: dict[str, Any], **options: Any) -> list[int]:
    with torch.no_grad(), dropflow.attach(model, policy(merge=STAGE | options)) as flow:
        flags = model.get_image_features(inputs["pixel_values"]).deepstack_features[-1]
        assert all((own[:, 0].diff() <= 0).all() for own in flags)  # they fill the first placeholders
        assert flow.plan.schedule(16).entry is None
    return [int(own[:, 0].sum()) for own in flags]


@torch.no_grad()
def test_the_projector_gets_the_merged_rows() -> None:
    model, inputs = tiny_llava(grid=6), prompt([(2, "I", 3), ("I", 4, "I", 2)], grid=6)
    eager = tiny_llava(grid=6, attention="eager").model.vision_tower
    hidden = eager(inputs["pixel_values"], output_hidden_states=True).hidden_states[3]
    layer = eager.encoder.layers[3]
    normed = layer.layer_norm1(hidden)
    query, keys = layer.self_attn.q_proj(normed)[:, 0], layer.self_attn.k_proj(normed)
    scores = torch.softmax((query[:, None] * keys).sum(-1) * 16**-0.5, 1)[:, 1:]
    got: list[torch.Tensor] = []
    handle = model.model.multi_modal_projector.register_forward_hook(lambda _, args, __: got.append(args[0]))
    sizes: set[int] = set()
    for variant in ("prumerge", "plus"):
        with dropflow.attach(model, policy(merge=STAGE | {"variant": variant, "outlier_factor": 0.5})) as flow:
            model(**inputs)
            visual = (flow.live()[0] & (inputs["input_ids"] == IMAGE)).sum(1).tolist()
        counts = []
        for image, own in enumerate(scores):
            kept = top(own, outliers(own, 0.5))
            if variant == "plus":
                kept = with_grid(kept, 36, first=0, step=grid_step(36, len(kept)))
            merged = merge_neighbours(hidden[image, 1:], keys[image, 1:], own, kept, 32)
            expected = torch.cat((merged, left_over(hidden[image, 1:], own, kept)))
            counts.append(len(expected))
            assert relative_error(got[-1][image, : counts[-1]], expected) < 1e-5
        assert visual == [counts[0], counts[1] + counts[2]]
        sizes |= set(counts)
    handle.remove()
    assert len(sizes) > 2, "images of one size would not test ragged rows"


@torch.no_grad()
def test_images_share_a_count_only_as_published() -> None:
    model, inputs = tiny_llava(grid=6), prompt(grid=6)
    own = {"variant": "prumerge", "outlier_factor": 0.1}
    alone = [kept_numbers(model, {"pixel_values": image[None]}, **own)[0] for image in inputs["pixel_values"]]
    assert kept_numbers(model, inputs, **own) == alone
    shared = kept_numbers(model, inputs, **own, count="reference")
    assert len(set(shared)) == 1 < len(set(alone))


@torch.no_grad()
def test_an_image_that_nothing_stands_out_of_and_one_that_is_kept_whole() -> None:
    model, inputs = tiny_llava(), prompt([("I", 2)])
    assert kept_numbers(model, inputs, variant="prumerge", outlier_factor=1e6) == [2]  # the best patch, and the rest
    assert kept_numbers(model, inputs, variant="plus", ratio=1.0) == [16]
    assert kept_numbers(model, inputs, variant="prumerge", ratio=0.25) == [5]


@torch.no_grad()
def test_after_the_projector_tokens_have_the_mean_score_of_their_patches() -> None:
    _, tiny = tiny_models()["internvl"]
    model, (inputs, _) = tiny.model(), tiny.prompt(((3, "I", 5),))
    tower, hidden = model.model.vision_tower, []
    layer = tower.encoder.layer[-1]
    handle = layer.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    (plain,) = model.get_image_features(inputs["pixel_values"]).pooler_output
    handle.remove()
    normed = layer.layernorm_before(hidden[0])[0]
    query, keys = layer.attention.q_proj(normed)[0], layer.attention.k_proj(normed)
    weights = torch.softmax((keys @ query) * 16**-0.5, 0)[1:]
    blocks = torch.arange(36).view(3, 2, 3, 2).transpose(1, 2).reshape(9, 4)  # 6 x 6 patches, 2 x 2 of them a token
    scores, mean_keys = weights[blocks].mean(1), keys[1:][blocks].mean(1)
    kept = top(scores, 3)
    expected = torch.cat((merge_neighbours(plain, mean_keys, scores, kept, 2), left_over(plain, scores, kept)))
    options = {"variant": "prumerge", "ratio": 0.34, "neighbours": 2}
    with dropflow.attach(model, policy(merge=STAGE | options)):
        (got,) = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert relative_error(got[:4], expected) < 1e-5
    assert not got[4:].any()


def test_towers_without_cls_are_refused() -> None:
    with pytest.raises(PolicyError, match=r"stages\.merge: needs cls"):
        dropflow.attach(tiny_llava(tower="siglip"), policy(merge=STAGE))
