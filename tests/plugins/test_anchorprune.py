"""AnchorPrune: recorded choices, what anchor and expansion promise, and what the released code got wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from goldens_2026 import DATA, encode_call, golden, layer_of_cls_rows
from hypothesis import given
from hypothesis import strategies as st
from llm_goldens import prune_call, stage_of
from method_goldens import FEW
from tiny import IMAGE, policy, prompt, tiny_llava
from tiny_clip import save_clip
from torch import Tensor
from torch.nn.functional import cosine_similarity, layer_norm, normalize
from transformers import CLIPModel

import dropflow
from dropflow import Entry
from dropflow.errors import UnsupportedCall
from dropflow.policy.plan import resolve
from dropflow.testing import assert_stage_conforms, tiny_models
from dropflow.units import BackboneShape
from dropflow_anchorprune import AnchorExpansion
from dropflow_anchorprune.choice import Anchoring, anchor, expanded

STAGE = "anchorprune/anchor-expansion"
CHOICES = sorted(path.stem for path in DATA.glob("anchor_*.npz") if path.stem not in ("anchor_llava", "anchor_qwen"))


def how(meta: dict[str, Any]) -> Anchoring:
    return Anchoring(meta.get("tau", 0.2), meta.get("patience", 3), meta.get("kmax_ratio", 0.5))


@pytest.mark.parametrize("case", CHOICES)
def test_recorded_choices(case: str) -> None:
    recorded = golden(case)
    meta, features = recorded["meta"], recorded["features"]
    anchors = anchor(recorded["relevance"], features, meta["k_total"], meta["k_min"], how(meta))
    assert torch.equal(anchors, recorded["out_anchor"])
    others = recorded.get("expansion_features", features)
    chosen = expanded(anchors, recorded["importance"], others, meta["k_total"])
    assert torch.equal(chosen.sort().values, recorded["out_selected"])


@pytest.mark.parametrize("case", CHOICES)
def test_recorded_choices_through_the_stage(case: str) -> None:
    """The features are the projected tokens, less what makes their cosine with the text the recorded relevance."""
    recorded = golden(case)
    meta, count = recorded["meta"], len(recorded["relevance"])
    if "expansion_features" in recorded:
        pytest.skip("its two kinds of features are those of a tower and CLIP's")
    ranks = torch.argsort(torch.argsort(recorded["relevance"], stable=True)).float()
    unit = normalize(recorded["features"], dim=1)
    tokens = torch.cat((unit, (ranks[:, None] - count) * 1e-4), 1)  # a side so small that no other cosine feels it
    text = torch.zeros(1, tokens.shape[1])
    text[0, -1] = 1
    assert torch.equal(asked(meta, tokens, text, recorded["importance"][:, None]), recorded["out_selected"])


def asked(meta: dict[str, Any], tokens: Tensor, text: Tensor, carried: Tensor) -> Tensor:
    """What the stage keeps of one image that is followed by the text."""
    options = {"keep": meta["k_total"], "core": meta["k_min"], "threshold": meta.get("tau", 0.2)}
    options |= {"patience": meta.get("patience", 3), "ratio": meta.get("kmax_ratio", 0.5)}
    stage, count = stage_of(AnchorExpansion, **options), len(tokens)
    call = prune_call(0, 1, count, 1 + count + len(text), lambda *_: pytest.fail("no attention of the LLM is read"))
    embeds = torch.cat((tokens.new_zeros(1, tokens.shape[1]), tokens, text))[None]
    carry = torch.zeros(1, embeds.shape[1], carried.shape[1])
    carry[0, 1 : 1 + count] = carried
    call = replace(call, entry=Entry(embeds, call.image_id), carried=carry)
    return stage.prune(call).mask[0, 1 : 1 + count].nonzero()[:, 0]


def test_a_recorded_llava() -> None:
    """By CLIP's joint space: post norm, visual projection and the vectors of the question are recorded."""
    recorded = golden("anchor_llava")
    meta, hidden = recorded["meta"], recorded["hidden"]

    @dataclass
    class Space:
        tower_width: int = hidden.shape[2]

        def patches(self, rows: Tensor) -> Tensor:
            norm = recorded["post_norm_weight"], recorded["post_norm_bias"]
            return layer_norm(rows, rows.shape[1:], *norm, meta["ln_eps"]) @ recorded["visual_projection"].T

        def text(self, question: str) -> Tensor:
            assert question == "what is it"
            return recorded["text_embeds"]

    options = {"keep": meta["k_total"], "core": meta["k_min"], "clip": "any"}
    stage, patches = stage_of(AnchorExpansion, **options), hidden[0, 1:]
    stage._space = Space()
    answer = stage.encode(encode_call([patches], layer_of_cls_rows(recorded["cls_rows"])))
    (carry,) = answer.carry
    importance = carry[:, 0] / carry[:, 0].sum()
    torch.testing.assert_close(importance, recorded["out_importance"][0], rtol=1e-4, atol=1e-5)
    call = prune_call(0, 1, 36, 38, lambda *_: pytest.fail("no attention of the LLM is read"))
    carried = torch.zeros(1, 38, carry.shape[1])
    carried[0, 1:37] = carry
    keep = stage.prune(replace(call, carried=carried, questions=("what is it",)))
    own = keep.mask[0, 1:37]
    assert torch.equal(own.nonzero()[:, 0], recorded["out_selected"][0])
    similar = keep.scores[0, 1:37]
    relevance = (similar - similar.min() + 1e-6) / (similar.max() - similar.min() + 1e-12)
    torch.testing.assert_close(relevance, recorded["out_relevance"][0], rtol=1e-3, atol=1e-5)
    projected = patches[own] @ recorded["projector_weight"].T + recorded["projector_bias"]
    torch.testing.assert_close(projected, recorded["out_rows"][0], rtol=1e-4, atol=1e-5)


def test_a_recorded_qwen() -> None:
    """The tower holds its patches window by window; every token's importance is put back to its place."""
    recorded = golden("anchor_qwen")
    place = torch.argsort(recorded["window_index"])
    members = place[:, None] * 4 + torch.arange(4)

    class Packed:
        def received(self) -> Tensor:
            return recorded["received"]

    call = encode_call([recorded["projected"]], Packed(), None, prefix=0)
    stage = stage_of(AnchorExpansion, keep=12)
    (carry,) = stage.encode(replace(call, members=lambda _: (members,))).carry
    meta = recorded["meta"]
    chosen = asked(meta, recorded["projected"], recorded["text_embeds"], carry)
    assert torch.equal(chosen, recorded["out_selected"])
    wrong = recorded["received"].view(-1, 4).mean(1, keepdim=True)
    assert not torch.equal(asked(meta, recorded["projected"], recorded["text_embeds"], wrong), chosen)


def drawn(seed: int, tokens: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return (
        torch.rand(tokens, generator=dice),
        torch.rand(tokens, generator=dice),
        torch.randn(tokens, 5, generator=dice),
    )


def formula(
    relevance: Tensor, importance: Tensor, near: Tensor, far: Tensor, count: int, least: int
) -> tuple[list[int], list[int]]:
    """Anchor and all that stays, said again token by token, with the published threshold, patience and ratio."""
    close = cosine_similarity(near.double()[:, None], near.double()[None], dim=-1)
    apart = 1 - cosine_similarity(far.double()[:, None], far.double()[None], dim=-1)
    ranked = sorted(range(len(relevance)), key=lambda i: -float(relevance[i]))
    core, found, news = ranked[:least], list(ranked[:least]), 0
    for token in ranked[least : max(least, int(0.5 * count))]:
        found.append(token)
        news += min(1 - float(close[token, one]) for one in core) > 0.2
        if news == 3:
            break
    chosen = list(found)
    while len(chosen) < count:
        rest = [i for i in range(len(relevance)) if i not in chosen]
        worth = {i: min(1.0, *(float(apart[i, j]) for j in found)) for i in rest}
        worth = {i: min(worth[i], *(float(apart[i, j]) for j in chosen)) * float(importance[i]) for i in rest}
        chosen.append(max(rest, key=worth.__getitem__))
    return found, sorted(chosen)


@FEW
@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(1, 6))
def test_a_choice_is_the_formulas(seed: int, count: int, least: int) -> None:
    relevance, importance, features = drawn(seed)
    least = min(least, count)
    anchors = anchor(relevance, features, count, least, Anchoring())
    expected, chosen = formula(relevance, importance, features, features, count, least)
    assert anchors.tolist() == expected
    assert sorted(expanded(anchors, importance, features, count).tolist()) == chosen


@pytest.mark.parametrize("seed", range(4))
def test_what_does_not_matter_and_how_long_the_anchor_is(seed: int) -> None:
    relevance, importance, features = drawn(seed)
    dice = torch.Generator().manual_seed(seed)
    anchors = anchor(relevance, features, 20, 4, Anchoring())
    chosen = expanded(anchors, importance, features, 20)
    assert len(set(chosen.tolist())) == 20
    assert torch.equal(chosen[: len(anchors)], anchors)
    assert 4 <= len(anchors) <= 10
    longer = features * (0.5 + torch.rand(30, 1, generator=dice))
    assert torch.equal(anchor(relevance.exp() * 3, longer, 20, 4, Anchoring()), anchors), "only the order of r matters"
    assert torch.equal(expanded(anchors, importance * 7, longer, 20), chosen)
    assert len(anchor(relevance, features, 20, 4, Anchoring(threshold=2.0))) == 10
    assert len(anchor(relevance, features, 20, 4, Anchoring(threshold=-1.0, patience=1))) == 5
    assert anchor(relevance, features, 20, 99, Anchoring()).tolist() == relevance.topk(20).indices.tolist()


def test_without_importance_the_first_tokens_fill_up() -> None:
    relevance, _, features = drawn(0, 8)
    anchors = anchor(relevance, features, 4, 2, Anchoring())
    chosen = expanded(anchors, torch.tensor([0.0, -1, 0, 0, -2, 0, 0, 0]), features, 6).tolist()
    assert chosen == [*anchors.tolist(), *[i for i in range(8) if i not in anchors][: 6 - len(anchors)]]


def kept(flow: dropflow.Flow, ids: Tensor, tokens: int = 16) -> list[list[list[int]]]:
    """Per sample and image, the places that are live before the first layer."""
    live = [flow.live()[0, sample][row].view(-1, tokens) for sample, row in enumerate(ids == IMAGE)]
    return [[image.nonzero()[:, 0].tolist() for image in own] for own in live]


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random CLIP whose tower is as wide as the tiny LLaVA's."""
    return save_clip(tmp_path_factory.mktemp("clip"), width=16)


@torch.no_grad()
def test_with_clip_every_image_is_asked_by_its_own_question(clip: str) -> None:
    model, inputs = tiny_llava(), prompt()
    questions = ["how many dogs", "what colour is the bus", "who"]
    eager = tiny_llava(attention="eager").model.vision_tower
    seen = eager(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    space = CLIPModel.from_pretrained(clip).eval()
    expected = []
    for image, sample in enumerate((0, 1, 1)):
        rows = seen.hidden_states[-2][image, 1:]
        near = space.visual_projection(space.vision_model.post_layernorm(rows))
        text = dropflow.operators.JointSpace(clip, backbone(model), "clip").text(questions[sample])
        relevance = -cosine_similarity(near, text, dim=-1)
        importance = seen.attentions[-2][image, :, 0, 1:].mean(0)
        expected.append(formula(relevance, importance, near, rows, 7, 1)[1])
    with dropflow.attach(model, policy(anchor={"use": STAGE, "keep": 7, "clip": clip})) as flow:
        with dropflow.questions(questions):
            model(**inputs)
            assert kept(flow, inputs["input_ids"]) == [[expected[0]], expected[1:], []]
        with pytest.raises(UnsupportedCall, match="questions: none stated"):
            model(**inputs)


def backbone(model: Any) -> Any:
    from dropflow.backbone.backbone import backbone_for

    return backbone_for(model)


@torch.no_grad()
def test_every_image_of_a_call_has_its_own_importance() -> None:
    """The released code leaves that of all images but the first in the order of the tower's windows."""
    _, tiny = tiny_models()["qwen2_5_vl"]
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 2, "I", 2, "I", 5)])
    vision = model.model.visual
    given = {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
    carried: list[Tensor] = []

    class Look(AnchorExpansion):
        @dropflow.hookimpl
        def encode(self, call: dropflow.EncodeCall) -> dropflow.Encode:
            answer = super().encode(call)
            carried.extend(answer.carry or ())
            return answer

    pictures = list(
        zip(
            given["pixel_values"].split((given["image_grid_thw"].prod(1)).tolist()),
            given["image_grid_thw"],
            strict=True,
        )
    )
    with dropflow.attach(model, policy(anchor={"use": Look, "keep": 3})):
        model(**inputs)
        together = list(carried)
        for pixels, grid in pictures:
            model.model.get_image_features(pixel_values=pixels, image_grid_thw=grid[None])
    assert vision.config.fullatt_block_indexes, "the last block sees the whole picture"
    assert len(together) == 3
    for own, alone in zip(together, carried[3:], strict=True):
        torch.testing.assert_close(own, alone, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_a_sample_without_a_question_is_not_pruned_and_units_keep_their_positions() -> None:
    _, tiny = tiny_models()["qwen2_5_vl"]
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 5)])
    ids = inputs["input_ids"]
    with dropflow.attach(model, policy(anchor={"use": STAGE, "keep": 3})) as flow:
        model(**inputs)
        assert int((flow.live()[0] & (ids == IMAGE)).sum()) == 3
        labels = torch.full_like(ids, -100)
        model(**inputs, labels=labels)
        assert int((flow.live()[0] & (ids == IMAGE)).sum()) == int((ids == IMAGE).sum())


def test_protected_tokens_stay_and_count() -> None:
    model, inputs = tiny_llava(), prompt([("I", 4)])
    stages = {"keys": {"use": "mustdrop/key-set", "share": 0.2}, "anchor": {"use": STAGE, "keep": 6}}
    with torch.no_grad(), dropflow.attach(model, policy(**stages)) as flow:
        model(**inputs)
        assert int((flow.live()[0] & (inputs["input_ids"] == IMAGE)).sum()) == 6
        protected = flow._last().prompt.protected[0]
        assert bool(flow.live()[0, 0][protected].all())
        assert int(protected.sum()) == 4


@pytest.mark.parametrize("tokens", [32, 64, 128])
def test_published_settings_for_llava(tokens: int) -> None:
    published = dropflow.load_policy(f"anchorprune-{tokens}")
    assert resolve(published, BackboneShape(32, 576)).schedule().per_layer == (tokens,) * 32
    options = published.stages["anchor"].options
    assert (options.core, round(tokens / 6.4)) == ({32: 5, 64: 10, 128: 20}[tokens],) * 2
    assert (options.threshold, options.patience, options.ratio) == (0.2, 3, 0.5)


@pytest.mark.parametrize("tokens", [64, 128, 256])
def test_published_settings_for_qwen(tokens: int) -> None:
    published = dropflow.load_policy(f"anchorprune-qwen2.5-{tokens}")
    assert resolve(published, BackboneShape(28, 1296)).schedule().per_layer == (tokens,) * 28
    options = published.stages["anchor"].options
    assert (options.core, round(tokens / 6.4)) == ({64: 10, 128: 20, 256: 40}[tokens],) * 2
    assert (options.clip, published.positions) == (None, "persistent")


def test_with_clip_it_conforms_where_the_tower_is_clips(clip: str) -> None:
    families = {name: own for name, own in tiny_models().items() if name in ("llava", "qwen2_vl")}
    cells = assert_stage_conforms(STAGE, {"keep": 0.4, "clip": clip}, families)
    assert {cell.adapter: cell.outcome for cell in cells} == {"llava": "run", "qwen2_vl": "refused"}
