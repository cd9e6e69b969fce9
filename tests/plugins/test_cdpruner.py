"""CDPruner: recorded choices, what a greedy DPP promises, and relevance by CLIP's space or the LLM's embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_goldens import FEW, recorded
from tiny import IMAGE, policy, prompt, tiny_llava
from tiny_clip import LONG, WORDS, save_clip
from torch.nn.functional import cosine_similarity, normalize
from transformers import CLIPConfig, CLIPModel

import dropflow
from dropflow.backbone.backbone import backbone_for
from dropflow.errors import PolicyError, UnsupportedCall
from dropflow.operators import JointSpace
from dropflow.testing import assert_stage_conforms, tiny_models
from dropflow_cdpruner.dpp import greedy_map, mean_cosine, rescaled, sharpened

STAGE = "cdpruner/conditional-dpp"
QUESTIONS = ["how many dogs", "what colour is the bus", "who"]


def drawn(seed: int, tokens: int = 20, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, dim, generator=dice), 0.1 + torch.rand(tokens, generator=dice)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random CLIP whose tower is as wide as the tiny LLaVA's."""
    return save_clip(tmp_path_factory.mktemp("clip"), width=16)


@pytest.mark.parametrize("case", recorded("cdpruner"))
def test_recorded_choices(case: str) -> None:
    """The published code rescales relevance over all images of a call, as `reference` does over those of a sample."""
    golden = recorded("cdpruner")[case]
    similar = [-mean_cosine(image, golden["text_embeds"]) for image in golden["image_embeds"]]
    low, high = torch.stack(similar).min(), torch.stack(similar).max()
    for image, own in enumerate(similar):
        features, relevance = golden["features"][image], rescaled(own, low, high)
        chosen = greedy_map(features, relevance, golden["T"])
        assert torch.equal(chosen.sort().values, golden["select_sorted"][image])
        if "order" in golden:
            assert torch.equal(chosen, golden["order"][image])
            torch.testing.assert_close(relevance, golden["relevance"][image], rtol=0, atol=1e-6)
        if "alone" in golden:
            alone = greedy_map(features, rescaled(own), golden["T"])
            assert torch.equal(alone.sort().values, golden["alone"][image])


@FEW
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_every_choice_is_the_one_that_makes_the_determinant_largest(seed: int, count: int) -> None:
    features, relevance = (part.double() for part in drawn(seed))
    unit = normalize(features, dim=1)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    chosen: list[int] = []
    for token in greedy_map(features, relevance, count).tolist():
        rest = [i for i in range(20) if i not in chosen]
        logs = {i: float(torch.linalg.slogdet(kernel[[*chosen, i]][:, [*chosen, i]])[1]) for i in rest}
        assert logs[token] == pytest.approx(max(logs.values()), abs=1e-3)
        chosen.append(token)


@pytest.mark.parametrize("seed", range(4))
def test_what_does_not_matter_and_what_does(seed: int) -> None:
    features, relevance = drawn(seed)
    dice = torch.Generator().manual_seed(seed)
    chosen = greedy_map(features, relevance, 8)
    rotation, order = torch.linalg.qr(torch.randn(8, 8, generator=dice))[0], torch.randperm(20, generator=dice)
    assert torch.equal(greedy_map(features * (0.5 + torch.rand(20, 1, generator=dice)), relevance, 8), chosen)
    assert torch.equal(greedy_map(features @ rotation, relevance, 8), chosen)
    assert torch.equal(order[greedy_map(features[order], relevance[order], 8)], chosen)
    assert torch.equal(greedy_map(features, relevance, 5), chosen[:5])
    assert chosen[0] == relevance.argmax()
    orthonormal = torch.linalg.qr(torch.randn(20, 20, generator=dice))[0]
    assert torch.equal(greedy_map(orthonormal, relevance, 8), relevance.sort(descending=True).indices[:8])
    similar = torch.randn(20, generator=dice)
    torch.testing.assert_close(rescaled(3 * similar + 2), rescaled(similar), rtol=0, atol=1e-6)
    torch.testing.assert_close(rescaled(-similar), 1 - rescaled(similar), rtol=0, atol=2e-6)


def test_more_tokens_than_are_independent_are_the_most_relevant_of_the_rest() -> None:
    """The released code divides by a residual of zero here, and keeps fewer tokens than were asked for."""
    features, relevance = drawn(0, tokens=12, dim=3)
    chosen = greedy_map(features, relevance, 7)
    rest = [i for i in relevance.sort(descending=True).indices.tolist() if i not in chosen[:3].tolist()]
    assert chosen[3:].tolist() == rest[:4]
    assert sorted(greedy_map(features, relevance, 99).tolist()) == list(range(12))
    assert greedy_map(features, relevance, 0).tolist() == []
    assert greedy_map(torch.zeros(3, 2), torch.tensor([0.1, 0.9, 0.5]), 2).tolist() == [1, 2]


def test_equal_relevance_leaves_the_choice_to_diversity() -> None:
    features, _ = drawn(1)
    assert torch.equal(rescaled(torch.full((20,), 0.3)), torch.ones(20))
    assert torch.equal(greedy_map(features, torch.ones(20), 6), greedy_map(features, torch.full((20,), 0.5), 6))
    one, two = sharpened(torch.tensor([0.0, 1.0]), 0.5).tolist()
    assert (one, two) == (1.0, pytest.approx(1.6487213))


def formula(projected: torch.Tensor, similar: torch.Tensor, count: int) -> list[int]:
    """Kept places by greedy choice with whole determinants, in float64."""
    relevance = (similar - similar.min() + 1e-6) / (similar.max() - similar.min())
    unit = normalize(projected.double(), dim=1)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    chosen: list[int] = []
    while len(chosen) < count:
        rest = [i for i in range(len(kernel)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]))))
    return sorted(chosen)


def kept(flow: dropflow.Flow, ids: torch.Tensor) -> list[list[list[int]]]:
    """Per sample and image, the places that are live before the first layer."""
    found = []
    for sample, row in enumerate(ids == IMAGE):
        places = flow.live()[0, sample][row].view(-1, 16)
        found.append([image.nonzero()[:, 0].tolist() for image in places])
    return found


@torch.no_grad()
def test_relevance_by_the_llms_own_embeddings() -> None:
    model, inputs = tiny_llava(), prompt()
    embeds = model.get_input_embeddings()(inputs["input_ids"]).double()
    projected = iter(model.get_image_features(inputs["pixel_values"]).pooler_output)
    with dropflow.attach(model, policy(dpp={"use": STAGE, "keep": 5})) as flow:
        model(**inputs)
        found = kept(flow, inputs["input_ids"])
    for sample, ids in enumerate(inputs["input_ids"]):
        visual = ids == IMAGE
        after = (visual.cumsum(0) > 0) & ~visual
        for own in found[sample]:
            rows = next(projected).double()
            similar = cosine_similarity(rows[:, None], embeds[sample, after][None], dim=-1).mean(1)
            assert own == formula(rows, similar, 5)
    assert [len(images) for images in found] == [1, 2, 0]


def joint(clip: str, features: torch.Tensor, question: str) -> torch.Tensor:
    """Less the cosine of patches and question by CLIP's own methods."""
    space = CLIPModel.from_pretrained(clip).eval()
    ids = [WORDS.index("<s>"), *(WORDS.index(word) for word in question.split()), WORDS.index("</s>")]
    text = space.get_text_features(torch.tensor([ids])).pooler_output
    patches = space.visual_projection(space.vision_model.post_layernorm(features))
    return -cosine_similarity(patches.double(), text.double(), dim=-1)


@torch.no_grad()
def test_relevance_by_clip_reads_each_samples_question(clip: str) -> None:
    model, inputs = tiny_llava(), prompt()
    hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    projected = model.get_image_features(inputs["pixel_values"]).pooler_output
    expected = [
        [formula(projected[image], joint(clip, hidden[image], QUESTIONS[sample]), 5) for image in own]
        for sample, own in enumerate([[0], [1, 2], []])
    ]
    other = formula(projected[0], joint(clip, hidden[0], "dogs"), 5)
    options = {"use": STAGE, "keep": 5, "clip": clip}
    with dropflow.attach(model, policy(dpp=options)) as flow:
        with dropflow.questions(QUESTIONS):
            model(**inputs)
            assert kept(flow, inputs["input_ids"]) == expected
            model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False)
            both = inputs["input_ids"].repeat_interleave(2, 0)
            assert kept(flow, both) == [images for images in expected for _ in range(2)]
        with dropflow.questions(["dogs", *QUESTIONS[1:]]):
            model(**inputs)
            assert kept(flow, inputs["input_ids"]) == [[other], *expected[1:]]
    assert other != expected[0][0]
    with dropflow.questions(QUESTIONS), dropflow.attach(model, policy(dpp={**options, "negate": False})) as flow:
        model(**inputs)
        opposite = kept(flow, inputs["input_ids"])
    assert opposite[0][0] == formula(projected[0], -joint(clip, hidden[0], QUESTIONS[0]), 5)


@torch.no_grad()
def test_reference_rescales_over_all_images_of_a_sample(clip: str) -> None:
    model, inputs = tiny_llava(), prompt([("I", 2, "I", 9)])
    options = {"use": STAGE, "keep": 5, "clip": clip}
    hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    similar = torch.stack([joint(clip, features, "who") for features in hidden])
    projected = model.get_image_features(inputs["pixel_values"]).pooler_output
    for reference in (False, True):
        with (
            dropflow.questions(["who"]),
            dropflow.attach(model, policy(dpp={**options, "reference": reference})) as flow,
        ):
            model(**inputs)
            found = kept(flow, inputs["input_ids"])[0]
        for image, own in enumerate(found):
            ends = (similar.min(), similar.max()) if reference else (similar[image].min(), similar[image].max())
            relevance = rescaled(similar[image], *ends)
            assert own == sorted(greedy_map(projected[image], relevance, 5).tolist())


@torch.no_grad()
def test_a_long_question_is_read_in_segments(clip: str) -> None:
    space = JointSpace(clip, backbone_for(tiny_llava()), "stages.dpp.clip")
    model = CLIPModel.from_pretrained(clip).eval()
    words = [WORDS.index(word) for word in LONG]
    start, end = WORDS.index("<s>"), WORDS.index("</s>")

    def read(ids: list[int]) -> torch.Tensor:
        return model.get_text_features(torch.tensor([ids])).pooler_output[0]

    long, close = " ".join(LONG), {"rtol": 1e-5, "atol": 1e-5}
    own = [read([start, *words[:7], end]), read([start, *words[7:], end])]
    torch.testing.assert_close(space.text(long), torch.stack(own), **close)
    # as released: the first segment has no end token, and its state is taken at the largest id
    cut = [read([start, *words[:8]]), read([*words[8:], end])]
    torch.testing.assert_close(space.text(long, reference=True), torch.stack(cut), **close)
    torch.testing.assert_close(space.text("who"), read([start, WORDS.index("who"), end])[None], **close)


def test_what_cannot_be_right_is_refused_and_the_model_goes_on(clip: str, tmp_path: Path) -> None:
    model, inputs = tiny_llava(), prompt()
    plain = model(**inputs).logits
    options: dict[str, Any] = {"use": STAGE, "keep": 5, "clip": clip}
    with dropflow.attach(model, policy(dpp=options)):
        with pytest.raises(UnsupportedCall, match=r"questions: none stated for a batch of 3.*dropflow.questions"):
            model(**inputs)
        with dropflow.questions(["who", "what"]), pytest.raises(UnsupportedCall, match="2 stated for a batch of 3"):
            model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(TypeError, match="got a single string"), dropflow.questions("who"):
        pass
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(PolicyError, match=r"stages.dpp.clip: expected a folder or hub name of a CLIP model"):
        dropflow.attach(model, policy(dpp={**options, "clip": str(empty)}))
    (empty / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(PolicyError, match="it is a model of type 'llama'"):
        dropflow.attach(model, policy(dpp={**options, "clip": str(empty)}))
    sizes = {"hidden_size": 24, "num_attention_heads": 2}
    CLIPConfig(vision_config=sizes).save_pretrained(empty)
    with pytest.raises(PolicyError, match=r"a CLIP vision tower of width 24, but that of the model is.* of width 16"):
        dropflow.attach(model, policy(dpp={**options, "clip": str(empty)}))
    with pytest.raises(PolicyError, match="but that of the model is 'siglip_vision_model'"):
        dropflow.attach(tiny_llava(tower="siglip"), policy(dpp=options))
    assert torch.equal(model(**inputs).logits, plain)


def test_with_clip_it_conforms_where_the_tower_is_clips(clip: str) -> None:
    families = {name: own for name, own in tiny_models().items() if name in ("llava", "qwen2_vl")}
    cells = assert_stage_conforms(STAGE, {"keep": 0.4, "clip": clip}, families)
    assert {cell.adapter: cell.outcome for cell in cells} == {"llava": "run", "qwen2_vl": "refused"}
