"""Token merging: recorded matchings and a recorded tower, what merging preserves, and proportional attention."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from flash_stand_in import registered
from hypothesis import given
from hypothesis import strategies as st
from method_goldens import DATA, FEW, recorded
from tiny import IMAGE, policy, prompt, relative_error, tiny_llava
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import dropflow
from dropflow import EncodeCall, Stage, hookimpl
from dropflow.errors import PolicyError, UnsupportedModel
from dropflow.policy.plan import resolve
from dropflow.units import BackboneShape
from dropflow_tome.matching import match, merge
from dropflow_tome.schedule import schedule

STAGE = {"use": "tome/token-merging"}
CASES = [case for case in recorded("tome_merge") if case not in ("d_distill", "f_chain")]


@pytest.mark.parametrize("case", CASES)
def test_recorded_matchings(case: str) -> None:
    golden = recorded("tome_merge")[case]
    for row, metric in enumerate(golden["metric"]):
        found = match(metric, golden["r"], has_cls=golden["class_token"])
        assert torch.equal(found.sources, golden["src_idx"][row])
        assert torch.equal(found.destinations, golden["dst_idx"][row])
        assert torch.equal(found.unmerged, golden["unm_idx"][row])
        sizes = golden["size_in"][row, :, 0] if "size_in" in golden else torch.ones(len(metric))
        merged, size = merge(found, golden["x"][row], sizes)
        assert relative_error(merged, golden["merged"][row]) < 2e-5
        assert relative_error(size, golden["size"][row, :, 0]) < 2e-5


def test_a_recorded_chain_of_two() -> None:
    golden = recorded("tome_merge")["f_chain"]
    tokens, sizes = golden["x0"][0], torch.ones(17)
    for step in (0, 1):
        left = golden[f"x{step + 1}"].shape[1]
        found = match(golden[f"metric{step}"][0], len(tokens) - left, has_cls=True)
        tokens, sizes = merge(found, tokens, sizes)
        assert relative_error(tokens, golden[f"x{step + 1}"][0]) < 2e-5
        assert torch.equal(sizes, golden[f"size{step + 1}"][0, :, 0])


def test_recorded_schedules() -> None:
    for key, expected in json.loads((DATA / "tome_parse_r.json").read_text()).items():
        layers, given_r, *kind = key.split("|")
        r = json.loads(given_r)
        found = schedule(int(layers), int(r[0]), r[1]) if kind == ["tuple"] else schedule(int(layers), r)
        assert found == expected, key
    assert sum(schedule(24, 16, -1.0)) == 373
    assert schedule(1, 4, 1.0) == [0]


@FEW
@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(0, 30), st.booleans())
def test_merging_preserves_sizes_and_weighted_sums(seed: int, tokens: int, r: int, has_cls: bool) -> None:
    dice = torch.Generator().manual_seed(seed)
    x, metric = torch.randn(tokens, 3, generator=dice), torch.randn(tokens, 4, generator=dice)
    sizes = torch.randint(1, 5, (tokens,), generator=dice).float()
    found = match(metric, r, has_cls=has_cls)
    merged, size = merge(found, x, sizes)
    assert len(merged) == tokens - min(r, (tokens - has_cls) // 2)
    assert size.sum() == sizes.sum()
    assert torch.allclose((merged * size[:, None]).sum(0), (x * sizes[:, None]).sum(0), atol=1e-4)
    constant, _ = merge(found, torch.ones(tokens, 3), sizes)
    assert torch.allclose(constant, torch.ones_like(constant))
    if has_cls:
        assert torch.equal(merged[0], x[0] * sizes[0] / sizes[0])
        assert size[0] == sizes[0]


def recorded_tower() -> tuple[Any, dict[str, Any]]:
    """The recorded blocks as a CLIP tower, whose last layer lies after the features."""
    golden = {
        f"{case}/{key}".strip("/"): v for case, own in recorded("tome_tower_prop").items() for key, v in own.items()
    }
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=10, patch_size=2, hidden_act="gelu", layer_norm_eps=1e-6)
    text = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=8, vision_feature_layer=-2)
    model = LlavaForConditionalGeneration(config).eval()
    state = {}
    for number in range(4):
        block, own = f"w/blocks.{number}.", f"layers.{number}."
        for kind in ("weight", "bias"):
            parts = golden[f"{block}attn.qkv.{kind}"].chunk(3)
            names = ("q_proj", "k_proj", "v_proj")
            state |= {f"{own}self_attn.{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
            state[f"{own}self_attn.out_proj.{kind}"] = golden[f"{block}attn.proj.{kind}"]
            for name, recorded_name in (
                ("layer_norm1", "norm1"),
                ("layer_norm2", "norm2"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                state[f"{own}{name}.{kind}"] = golden[f"{block}{recorded_name}.{kind}"]
    found = model.model.vision_tower.encoder.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert all(name.startswith("layers.4.") for name in found.missing_keys)
    return model, golden


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_the_recorded_tower(attention: str) -> None:
    model, golden = recorded_tower()
    model.set_attn_implementation(attention)
    tower, outputs, sizes = model.model.vision_tower, [], []

    class Look(Stage[Any]):
        encode_at = ("features",)

        @hookimpl
        def encode(self, call: EncodeCall) -> None:
            sizes.extend(call.sizes)

    handles = [
        layer.register_forward_hook(lambda _, __, output: outputs.append(output))
        for layer in tower.encoder._modules["layers"]
    ]
    tower.pre_layrnorm.register_forward_hook(lambda _, __, ___: golden["x0"])
    which = policy(tome=STAGE | {"r": golden["r"].tolist(), "layers": 4}, look={"use": Look})
    with dropflow.attach(model, which):
        output = model.get_image_features(torch.zeros(2, 3, 10, 10))
    for handle in handles:
        handle.remove()
    for number in range(4):
        expected = golden[f"layer{number}_out"]
        assert outputs[number].shape == expected.shape
        assert relative_error(outputs[number], expected) < 2e-5, number
    for image, own in enumerate(sizes):
        assert torch.equal(own, golden["layer3_size"][image, 1:, 0])
        assert output.deepstack_features[-1][image][:, 0].tolist() == [1.0] * 13 + [0.0] * 12


@torch.no_grad()
def test_a_merged_token_counts_as_its_copies() -> None:
    """Where all patches are the same, merging them changes nothing, so long as attention counts the members."""
    model, pixels = tiny_llava(), torch.ones(1, 3, 24, 24)
    model.model.vision_tower.embeddings.position_embedding.weight[1:] = 0
    plain = model.get_image_features(pixels).pooler_output[0]
    for proportional in (True, False):
        with dropflow.attach(model, policy(tome=STAGE | {"r": 4, "layers": 3, "proportional": proportional})):
            merged = model.get_image_features(pixels).pooler_output[0][:4]
        assert (relative_error(merged, plain[:4]) < 1e-5) == proportional


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_nothing_to_merge_is_bit_identical(tower: str) -> None:
    model, inputs = tiny_llava(tower=tower), prompt()
    plain = model.get_image_features(inputs["pixel_values"]).pooler_output

    class Split(Stage[Any]):
        """Has every layer run in two halves, and changes nothing."""

        encode_at = (0.5, 1.5, 2.5)

        @hookimpl
        def encode(self, call: EncodeCall) -> None:
            assert call.features[0].shape == (16, 16)

    for which in (policy(tome=STAGE | {"r": 0, "layers": 3}), policy(split={"use": Split})):
        with dropflow.attach(model, which):
            assert all(map(torch.equal, model.get_image_features(inputs["pixel_values"]).pooler_output, plain))


def test_gradients_are_those_of_a_tower_that_does_not_checkpoint() -> None:
    inputs = prompt([(3, "I", 6)])
    inputs["labels"] = inputs["input_ids"].masked_fill(torch.arange(26) < 23, -100)
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model = tiny_llava().train()
        if checkpointing:
            with warnings.catch_warnings():  # renamed in transformers 5.23
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": False})
        with dropflow.attach(model, policy(tome=STAGE | {"r": 4, "layers": 2})):
            model(**inputs).loss.backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert found[0]["model.vision_tower.embeddings.patch_embedding.weight"].abs().max() > 0
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-6), name


def test_published_numbers_of_tokens() -> None:
    for r, tokens in ((4, 484), (8, 392), (12, 300), (16, 208), (20, 116), (22, 70), (23, 47)):
        which = policy(tome=STAGE | {"r": r})
        assert resolve(dropflow.load_policy(which), BackboneShape(32, 576)).schedule().entry == tokens
    for name, tokens in (("tome-r8", 392), ("tome-r16", 208)):
        assert resolve(dropflow.load_policy(name), BackboneShape(32, 576)).schedule().per_layer == (tokens,) * 32
    model, inputs = tiny_llava(), prompt([("I", 2)])
    with torch.no_grad(), dropflow.attach(model, policy(tome=STAGE | {"r": 50, "layers": 3})) as flow:
        model(**inputs)
        assert (flow.live()[0] & (inputs["input_ids"] == IMAGE)).sum() == 2 == flow.plan.schedule().entry


def test_faults_are_named() -> None:
    model = tiny_llava()
    with pytest.raises(PolicyError, match=r"stages\.t: works at boundary 3\.5 of the vision encoder, expected 0 to 2"):
        dropflow.attach(model, policy(t=STAGE | {"layers": 4}))
    with pytest.raises(PolicyError, match=r"stages\.t: expected `r` as a list of at most 2 numbers"):
        dropflow.attach(model, policy(t=STAGE | {"layers": 2, "r": [1, 2, 3]}))
    with registered() as name, dropflow.attach(model, policy(t=STAGE | {"layers": 2})), torch.no_grad():
        model.model.vision_tower.config._attn_implementation = name
        with pytest.raises(UnsupportedModel, match="flash attention cannot weigh merged rows"):
            model.get_image_features(torch.zeros(1, 3, 24, 24))
