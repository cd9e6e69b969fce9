"""MustDrop's shipped policies: the published settings, and the engine's guarantees under each of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import IMAGE, prompt, relative_error, tiny_llava
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

import dropflow
from dropflow import Policy
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.policy import registry
from dropflow.policy.plan import resolve
from dropflow.testing import MaskedOracle
from dropflow.units import BackboneShape

THRESHOLDS = {
    "mustdrop-192": (0.001, 0.001),
    "mustdrop-128": (0.0012, 0.001),
    "mustdrop-64": (0.011, 0.01),
    "mustdrop-64-vizwiz": (0.005, 0.001),
}
MUSTDROP = [*THRESHOLDS, "mustdrop-digits"]
POLICIES = [*MUSTDROP, "mixed-digits"]
DIFFERENT = ["mustdrop-64", "mustdrop-digits", "mixed-digits"]
"""The published ones differ in thresholds alone."""
SAMPLES = ((3, "I", 5), ("I", 2, "I", 9), (4,))
BUDGET = {"max_new_tokens": 5, "min_new_tokens": 5}
MODES = {"greedy": {"do_sample": False}, "sampling": {"do_sample": True, "top_k": 0}, "beams": {"num_beams": 3}}


def small(**options: Any) -> Any:
    """Twelve layers and 36 patches, for which all policies are rescaled."""
    return tiny_llava(layers=12, grid=6, **options)


def dropping(name: str, positions: str = "persistent") -> Policy:
    """A shipped policy with thresholds that merge and drop some of 36 random patches."""
    changes = ["rescale=true", f"positions={positions}"]
    if name != "mixed-digits":
        published = dropflow.load_policy(name).stages["filter"].options.model_dump()
        ratio = published["individual_threshold"] / published["global_threshold"]
        changes += ["stages.merge.threshold=0.15", "stages.filter.global_threshold=0.04"]
        changes.append(f"stages.filter.individual_threshold={0.04 + 0.02 * min(ratio, 1.0)}")
    return dropflow.load_policy(name, changes)


def keeping(name: str, positions: str) -> Policy:
    """A shipped policy that is armed but drops nothing."""
    changes = ["rescale=true", f"positions={positions}", "stages.merge.budget=1.0"]
    if name == "mixed-digits":
        changes += ["stages.pyramid.keep={6: 1.0}", "stages.exit=null"]
    else:
        changes += ["stages.filter.global_threshold=0", "stages.filter.individual_threshold=0"]
    return dropflow.load_policy(name, changes)


@contextmanager
def encoded(model: Any, features: Any) -> Iterator[None]:
    """Let the model use image features made before."""

    def get_image_features(pixel_values: Tensor, **_: Any) -> Any:
        assert len(pixel_values) == len(features)
        return BaseModelOutputWithPooling(pooler_output=list(features))

    model.model.get_image_features = get_image_features
    try:
        yield
    finally:
        del model.model.get_image_features


def cached(which: Policy, live: Tensor) -> Tensor | None:
    """What generated tokens may see of the prompt, in every layer."""
    if "cache" not in which.stages:
        return None
    first = 1 if which.name != "mustdrop-digits" else 2  # boundary 2 of 32 is 1 of 12
    return torch.stack([live[-1] if layer >= first else live[layer] for layer in range(len(live))])


@pytest.mark.parametrize("name", THRESHOLDS)
def test_published_settings(name: str) -> None:
    plan = resolve(dropflow.load_policy(name), BackboneShape(32, 576))
    stages = dict(plan.stages)
    assert plan.policy.positions == "compact"
    merge, keys, cut, cache = (stages[key].options for key in ("merge", "keys", "filter", "cache"))
    assert (merge.at, merge.window, merge.threshold, merge.order) == (1, (3, 3), 0.8, "reference")
    assert (keys.share, keys.layer) == (0.08, -1)
    assert (cut.global_threshold, cut.individual_threshold) == THRESHOLDS[name]
    assert sorted(plan.prune_at) == [3, 7, 11, 15]
    assert stages["filter"].taps == (2, 6, 10, 14)
    assert cache.at == 2
    assert plan.schedule().per_layer == (None,) * 32  # the token number is emergent


def test_the_mixed_policy_has_a_schedule() -> None:
    plan = resolve(dropflow.load_policy("mixed-digits"), BackboneShape(12, 144))
    assert plan.schedule().per_layer == (104,) * 6 + (72,) * 3 + (36,) * 2 + (0,)
    assert {use.use.split("/")[0] for use in plan.policy.stages.values()} == {"mustdrop", "hidrop"}


@pytest.mark.parametrize("name", ["mustdrop-digits", "mixed-digits"])
@torch.no_grad()
def test_digits_policies_fit_the_embedded_models_shape(name: str) -> None:
    model, inputs = tiny_llava(layers=12, grid=12), prompt([(3, "I", 5)], grid=12)
    changes = [] if name == "mixed-digits" else ["stages.merge.threshold=0.1"]
    with dropflow.attach(model, name, overrides=changes) as flow:
        tokens = model.generate(**inputs, **BUDGET)
        report = flow.report()
        protected = int(flow._last().prompt.protected.sum())
    assert tokens.shape == (1, inputs["input_ids"].shape[1] + 5)
    counts = [layer.visual_tokens for layer in report.layers]
    assert all(b <= a for a, b in itertools.pairwise(counts))
    if name == "mixed-digits":
        assert counts == [104] * 6 + [72] * 3 + [36] * 2 + [0]
        assert protected == 9
    else:
        assert 144 > counts[0] > counts[-1] >= protected == math.ceil(0.08 * counts[0])


@pytest.mark.parametrize("positions", ["persistent", "compact"])
@pytest.mark.parametrize("name", DIFFERENT)
def test_dropping_nothing_is_bit_identical(name: str, positions: str) -> None:
    model, inputs = small(), prompt(SAMPLES, grid=6)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    runs = []
    for attached in (False, True):
        flow = dropflow.attach(model, keeping(name, positions)) if attached else None
        with torch.no_grad():
            runs.append((model(**inputs).logits, model(**inputs, labels=labels).loss))
            runs[-1] += (model.generate(**inputs, **BUDGET, do_sample=False),)
        if flow is not None:
            flow.detach()
    for plain, flowing in zip(*runs, strict=True):
        assert torch.equal(plain, flowing)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "sdpa") for name in POLICIES), *((name, "eager") for name in DIFFERENT)]
)
@torch.no_grad()
def test_the_prefill_equals_the_masked_run(name: str, attention: str, side: str) -> None:
    model, inputs = small(attention=attention), prompt(SAMPLES, grid=6, side=side)
    with dropflow.attach(model, dropping(name)) as flow:
        logits, live = model(**inputs).logits, flow.live()
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
    visual = (live & (inputs["input_ids"] == IMAGE)).sum(2)
    assert len(set(visual[:, 1].tolist())) >= 3, "too few drops to prove anything"
    assert visual[0, 1] < 72
    with encoded(model, features), MaskedOracle(model, live):
        expected = model(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    assert relative_error(logits[real], expected[real]) < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DIFFERENT)
@torch.no_grad()
def test_every_decode_step_equals_the_masked_run(name: str, mode: str) -> None:
    model, inputs, which = small(), prompt(SAMPLES, grid=6), dropping(name)
    with dropflow.attach(model, which) as flow:
        torch.manual_seed(5)
        tokens = model.generate(**inputs, **BUDGET, **MODES[mode])
        live = flow.live()[:, :: 3 if mode == "beams" else 1]
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
    with encoded(model, features):
        with MaskedOracle(model, live, held=cached(which, live)):
            torch.manual_seed(5)
            expected = model.generate(**inputs, **BUDGET, **MODES[mode], use_cache=False)
        torch.manual_seed(5)
        dense = model.generate(**inputs, **BUDGET, **MODES[mode])
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, dense), "pruning changed no token"


@pytest.mark.parametrize("name", ["mustdrop-64", "mixed-digits"])
def test_loss_and_every_gradient_equal_the_masked_run(name: str) -> None:
    model, inputs = small().train(), prompt(((3, "I", 9), ("I", 2, "I", 12), (8,)), grid=6)
    inputs["labels"] = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < 85, -100)
    gradients, losses = [], []
    with dropflow.attach(model, dropping(name)) as flow:
        losses.append(model(**inputs).loss)
        live = flow.live()
        losses[0].backward()
        gradients.append(
            {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}
        )
        model.zero_grad()
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
    with encoded(model, features), MaskedOracle(model, live):
        losses.append(model(**inputs, use_cache=False).loss)
        losses[1].backward()
    gradients.append({key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None})
    assert not live[:, 1].all()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[1].items():
        scale = gradient.abs().max()
        if scale > 1e-7:
            assert (gradients[0][key] - gradient).abs().max() / scale < 1e-3, key
    assert gradients[0]["model.vision_tower.embeddings.patch_embedding.weight"].abs().max() > 0


@pytest.mark.parametrize("positions", ["persistent", "compact"])
@pytest.mark.parametrize("name", DIFFERENT)
@torch.no_grad()
def test_every_sample_is_alone_in_its_batch(name: str, positions: str) -> None:
    model, samples = small(), [(3, "I", 5), ("I", 2, "I", 9), (4,), (1, "I", 11)]
    inputs = prompt(samples, grid=6)
    images = iter(inputs["pixel_values"])
    options = BUDGET | {"return_dict_in_generate": True, "output_logits": True}
    with dropflow.attach(model, dropping(name, positions)) as flow:
        together = model.generate(**inputs, **options)
        live = flow.live()
        for number, parts in enumerate(samples):
            own = inputs["attention_mask"][number].bool()
            alone = {"input_ids": inputs["input_ids"][number, own][None]}
            count = sum(part == "I" for part in parts)
            if count:
                alone["pixel_values"] = torch.stack([next(images) for _ in range(count)])
            output = model.generate(**alone, **options)
            for ours, theirs in zip(together.logits, output.logits, strict=True):
                assert relative_error(ours[number], theirs[0]) < 1e-5
            if count:
                assert torch.equal(flow.live()[:, 0], live[:, number, own])


@pytest.mark.parametrize("name", DIFFERENT)
@torch.no_grad()
def test_nothing_is_left_behind(name: str) -> None:
    model, inputs = small(), prompt(SAMPLES, grid=6)
    plain, names = model(**inputs).logits, list(model.state_dict())
    for positions in ("persistent", "compact"):
        with dropflow.attach(model, dropping(name, positions)):
            expected = model(**inputs).logits
            tower = model.model.vision_tower.encoder._modules["layers"]
            for layer in (tower[2], model.get_decoder()._modules["layers"][7]):
                handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("aborted")))
                with pytest.raises(RuntimeError, match="aborted"):
                    model(**prompt(SAMPLES, grid=6, side="right"))
                handle.remove()
                assert torch.equal(model(**inputs).logits, expected)
        assert not torch.equal(expected, plain)
        assert torch.equal(model(**inputs).logits, plain)
        assert list(model.state_dict()) == names


@pytest.mark.parametrize("layers", [12, 31, 40])
@torch.no_grad()
def test_any_depth(layers: int) -> None:
    """The published code loses caches after layer 32 and stops below 32 layers."""
    model, inputs = tiny_llava(layers=layers, grid=6), prompt([(3, "I", 5)], grid=6)
    which = dropflow.load_policy(dropping("mustdrop-64", "compact"), ["stages.merge.threshold=0.25"])
    with dropflow.attach(model, which) as flow:
        output = model.generate(**inputs, **BUDGET, return_dict_in_generate=True)
        live = flow.live()[:, 0]
        first = flow.plan.stages[3][1].context.scale.boundary(2, "at")
    final = int(live[-1].sum()) + 4
    lengths = [layer.keys.shape[2] for layer in getattr(output, CACHE_ARGUMENT).layers]
    assert len(lengths) == layers
    assert lengths[first:] == [final] * (layers - first)
    assert lengths[:first] == [int(own.sum()) + 4 for own in live[:first]]


def test_a_policy_for_another_shape_is_refused_without_rescale() -> None:
    for name in POLICIES:
        with pytest.raises(dropflow.errors.PolicyError, match=r"was tuned for (32|12) layers.*set `rescale: true`"):
            dropflow.attach(tiny_llava(layers=6, grid=6), name)
    assert set(POLICIES) <= set(registry.policy_files())
