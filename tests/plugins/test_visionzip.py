"""VisionZip: recorded reductions, the formula said again, and the stage on a tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_goldens import FEW, recorded
from tiny import IMAGE, policy, prompt, relative_error, tiny_llava

import dropflow
from dropflow.backbone import image_layout
from dropflow.errors import PolicyError
from dropflow.operators.selection import top
from dropflow.policy.plan import resolve
from dropflow.testing import tiny_models
from dropflow.units import BackboneShape
from dropflow_visionzip.contextual import contextual_tokens, split, targets

STAGE = "visionzip/dominant-contextual"


@pytest.mark.parametrize("case", recorded("visionzip"))
def test_recorded_reductions(case: str) -> None:
    golden = recorded("visionzip")[case]
    dominant, contextual = golden["dominant_arg"] - 1, golden["contextual"]
    for image, hidden in enumerate(golden["hidden"]):
        scores = golden["cls_attn_heads"][image].sum(0)
        assert torch.equal(top(scores, dominant), golden["all_indices"][image][1:] - 1)
        kept, left = split(scores, dominant)
        assert torch.equal(targets(len(left), contextual, left.device), golden["target_indices"])
        merged = contextual_tokens(hidden[1:][left], golden["metric"][image][1:][left], contextual)
        out = torch.cat((hidden[:1], hidden[1:][kept], merged))
        assert relative_error(out, golden["out"][image]) < 2e-5


@FEW
@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 45))
def test_contextual_tokens_are_the_formulas(seed: int, left: int, contextual: int) -> None:
    dice = torch.Generator().manual_seed(seed)
    features, metric = torch.randn(left, 5, generator=dice), torch.randn(left, 4, generator=dice)
    aim = list(range(0, left, max(1, left // min(contextual, left))))[: min(contextual, left)]
    members: dict[int, list[int]] = {target: [] for target in aim}
    for row in set(range(left)) - set(aim):
        cosines = torch.nn.functional.cosine_similarity(metric[row], metric[aim], dim=1)
        members[aim[int(cosines.argmax())]].append(row)
    mean = [features[own].mean(0) if own else torch.zeros(5) for own in members.values()]
    expected = features[aim] + torch.stack(mean)
    assert relative_error(contextual_tokens(features, metric, contextual), expected) < 1e-5


def test_alike_tokens_are_doubled_and_lone_targets_stay() -> None:
    features, metric = torch.ones(7, 3), torch.eye(7)[:, :4] + 1
    merged = contextual_tokens(features, metric, 3)
    assert sorted(merged[:, 0].tolist()) in ([1.0, 1.0, 2.0], [1.0, 2.0, 2.0], [2.0, 2.0, 2.0])
    assert torch.equal(contextual_tokens(features, metric, 7), features)
    assert contextual_tokens(features, metric, 0).shape == (0, 3)


@pytest.mark.parametrize("tokens", [64, 128, 192])
def test_published_settings(tokens: int) -> None:
    found = resolve(dropflow.load_policy(f"visionzip-{tokens}"), BackboneShape(32, 576)).schedule()
    assert found.per_layer == (tokens,) * 32
    dominant, contextual, left, step = {64: (54, 10, 523, 52), 128: (108, 20, 469, 23), 192: (162, 30, 415, 13)}[tokens]
    assert dominant + contextual == tokens
    assert 576 - (dominant - 1) == left
    aim = targets(left, contextual, torch.device("cpu"))
    assert (int(aim[1]), len(aim)) == (step, contextual)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_the_projector_gets_the_reduced_rows(tower: str) -> None:
    model, inputs = tiny_llava(tower=tower), prompt([(2, "I", 3), ("I", 4, "I", 2)])
    eager = tiny_llava(tower=tower, attention="eager").model.vision_tower
    seen = eager(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    layer, cls = eager.encoder.layers[2], tower == "clip"
    keys = layer.self_attn.k_proj(layer.layer_norm1(seen.hidden_states[2])).unflatten(2, (2, -1)).mean(2)
    got: list[torch.Tensor] = []
    handle = model.model.multi_modal_projector.register_forward_hook(lambda _, args, __: got.append(args[0]))
    with dropflow.attach(model, policy(zip={"use": STAGE, "dominant": 6, "contextual": 3})) as flow:
        model(**inputs)
        assert (flow.live()[0] & (inputs["input_ids"] == IMAGE)).sum(1).tolist() == [9, 18]
    handle.remove()
    for image, hidden in enumerate(seen.hidden_states[3]):
        weights = seen.attentions[2][image].sum(0)
        scores = weights[0, 1:] if cls else weights.mean(0)
        kept, left = split(scores, 6 - cls)
        patches, metric = hidden[int(cls) :], keys[image, int(cls) :]
        expected = torch.cat((hidden[: int(cls)], patches[kept], contextual_tokens(patches[left], metric[left], 3)))
        assert relative_error(got[0][image], expected) < 1e-5


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "llava_next"])
@torch.no_grad()
def test_after_the_projector_tokens_count_the_patches_they_are_made_of(family: str) -> None:
    adapter, tiny = tiny_models()[family]
    model, (inputs, _) = tiny.model(), tiny.prompt(((3, "I", 5),))
    backbone, name = adapter(model), "get_image_features"
    encode, given = getattr(backbone.core, name), {k: v for k, v in inputs.items() if k.startswith(("pixel", "image"))}
    plain = list(encode(**given).pooler_output)
    layouts = [one for own in backbone.layouts("image", [len(own) for own in plain], given) for one in own]
    images = [rows[layout.patch_rows(rows.device)] for layout, rows in image_layout.split(plain, [layouts])]

    class Asks(dropflow.Stage[Any]):
        needs = frozenset({"vision_attention"})
        vision_taps = (-1,)

        @dropflow.hookimpl
        def encode(self, call: dropflow.EncodeCall) -> None:
            seen.append(call.cls_attention(-1) if call.has_cls else call.received_attention(-1))
            seen.append(call.unit_keys(-1))

    seen: list[tuple[torch.Tensor, ...]] = []
    zipped = {"use": STAGE, "dominant": 4, "contextual": 2, "layer": -1}
    with dropflow.attach(model, policy(asks={"use": Asks}, zip=zipped)):
        model(**inputs)
        got = list(getattr(backbone.core, name)(**given).pooler_output)
    reduced = [rows[layout.patch_rows(rows.device)] for layout, rows in image_layout.split(got, [layouts])]
    assert len(images) > (family == "llava_next")
    for rows, left, scores, keys in zip(images, reduced, seen[0], seen[1], strict=True):
        kept, rest = split(scores, 4)
        expected = torch.cat((rows[kept], contextual_tokens(rows[rest], keys[rest], 2)))
        assert relative_error(left[:6], expected) < 1e-5
        assert not left[6:].any()


@torch.no_grad()
def test_there_are_never_more_tokens_than_placeholders() -> None:
    model, inputs = tiny_llava(), prompt([("I", 2)])
    for options, kept in (({"dominant": 12, "contextual": 9}, 16), ({"dominant": 0, "contextual": 0}, 0)):
        with dropflow.attach(model, policy(zip={"use": STAGE, **options})) as flow:
            model(**inputs)
            assert (flow.live()[0] & (inputs["input_ids"] == IMAGE)).sum() == kept


@torch.no_grad()
def test_models_whose_features_hold_the_cls_row_are_reduced_after_the_projector() -> None:
    model: Any = tiny_llava()
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(PolicyError, match=r"stages\.zip: works on what the projector gets, which this adapter"):
        dropflow.attach(model, policy(zip={"use": STAGE, "at": "features"}))
    with dropflow.attach(model, policy(zip={"use": STAGE, "dominant": 6, "contextual": 3})) as flow:
        assert flow.plan.encode_at.keys() == {None}
        rows = model.get_image_features(prompt()["pixel_values"]).pooler_output
    assert [int((own != 0).any(1).sum()) for own in rows] == [9] * 3
