"""Static caches serve every policy; quantized ones are correct if all layers hold the same tokens, and else refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lossless import quantized
from tiny import HIDROP, policy, prompt, relative_error, tiny_llava
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.tokens.cache import entries_of
from dropflow.engine.tokens.cache_layers import FlowLayer, UniformLayer
from dropflow.engine.tokens.static_layers import StaticFlowLayer
from dropflow.errors import UnsupportedCall, UnsupportedModel

TOKENS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
STATIC = {"cache_implementation": "static", "disable_compile": True}
ENCODES = policy(zip={"use": "visionzip/dominant-contextual", "dominant": 5, "contextual": 2})
"""Drops rows of the features, so that every layer of the decoder misses the same tokens."""
UNIFORM = {
    "encode": ENCODES,
    "divprune": policy(prune={"use": "divprune/max-min", "keep": 6}),
    "keep-all": policy(all={"use": "control/keep-all"}),
    "no stages": policy(),
}


@pytest.mark.parametrize("which", UNIFORM)
@torch.no_grad()
def test_a_static_cache_gives_the_tokens_of_a_dynamic_one(llava: Any, which: str) -> None:
    inputs = prompt()
    plain = llava.generate(**inputs, **TOKENS)
    with dropflow.attach(llava, UNIFORM[which]):
        expected = llava.generate(**inputs, **TOKENS)
        assert torch.equal(llava.generate(**inputs, **TOKENS, **STATIC), expected)
        beams = llava.generate(**inputs, **(TOKENS | {"num_beams": 2}))
        assert torch.equal(llava.generate(**inputs, **(TOKENS | {"num_beams": 2}), **STATIC), beams)
    assert torch.equal(expected, plain) == (which in ("keep-all", "no stages"))


@pytest.mark.parametrize("which", UNIFORM)
@torch.no_grad()
def test_a_quantized_cache_gives_the_tokens_of_a_dynamic_one(llava: Any, which: str) -> None:
    inputs = prompt()
    with dropflow.attach(llava, UNIFORM[which]):
        expected = llava.generate(**inputs, **TOKENS)
        cache = quantized()
        assert torch.equal(llava.generate(**inputs, **TOKENS, **{CACHE_ARGUMENT: cache}), expected)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 5
    missing = {"encode": 16 - 7, "divprune": 16 - 6}.get(which, 0)
    longest = inputs["attention_mask"].sum(1).max()  # the sample with two images is the longest
    held = entries_of(cache.layers[0]) - 5
    assert held == (longest - 2 * missing if missing else longest)


@torch.no_grad()
def test_a_second_turn_goes_on_with_a_static_cache(llava: Any) -> None:
    first, second = prompt(((3, "I", 5),)), torch.tensor([[5, 9, 4]])
    logits = []
    with dropflow.attach(llava, ENCODES):
        for cache in (DynamicCache(), StaticCache(llava.config.get_text_config(), max_cache_len=64), quantized()):
            llava(**first, **{CACHE_ARGUMENT: cache})
            told = [llava(input_ids=second, **{CACHE_ARGUMENT: cache}).logits]
            told.append(llava(**prompt(((2, "I", 1),), seed=5), **{CACHE_ARGUMENT: cache}).logits)
            told.append(llava(input_ids=second[:, :1], **{CACHE_ARGUMENT: cache}).logits)
            logits.append(told)
    for dynamic, static, packed in zip(*logits, strict=True):
        assert relative_error(static, dynamic) < 1e-5
        assert relative_error(packed, dynamic) < 1e-5


@pytest.mark.parametrize("which", [HIDROP, policy(cache={"use": "mustdrop/output-aware-cache", "at": 2})])
@torch.no_grad()
def test_a_policy_by_which_layers_differ_refuses_quantized_caches_before_the_forward(llava: Any, which: Any) -> None:
    inputs = prompt(((3, "I", 5),))
    with dropflow.attach(llava, which):
        expected = llava(**inputs).logits
        cache = quantized()
        with pytest.raises(UnsupportedModel, match="cannot hold a different length"):
            llava(**inputs, **{CACHE_ARGUMENT: cache})
        assert not cache.get_seq_length()
        with pytest.raises(UnsupportedModel, match="offloaded cache is not supported"):
            llava(
                **inputs,
                **{CACHE_ARGUMENT: DynamicCache(offloading=True)} if torch.cuda.is_available() else offloaded(),
            )
        assert torch.equal(llava(**inputs).logits, expected)


def offloaded() -> dict[str, Cache]:
    """A cache that claims to offload, since a real one needs a GPU."""
    cache = DynamicCache()
    cache.offloading = True
    return {CACHE_ARGUMENT: cache}


@torch.no_grad()
def test_a_static_cache_of_a_policy_is_refused_without_it(llava: Any) -> None:
    token = torch.tensor([[5]])
    cache = StaticCache(llava.config.get_text_config(), max_cache_len=64)
    with dropflow.attach(llava, ENCODES):
        llava(**prompt(((3, "I", 5),)), **{CACHE_ARGUMENT: cache})
        assert isinstance(cache.layers[0], StaticFlowLayer)
    with pytest.raises(UnsupportedCall, match="written under a policy"):
        llava(input_ids=token, **{CACHE_ARGUMENT: cache})
    with dropflow.attach(llava, HIDROP), pytest.raises(UnsupportedCall, match="another policy than 'test'"):
        llava(input_ids=token, **{CACHE_ARGUMENT: cache})
    with dropflow.attach(llava, ENCODES):
        assert torch.isfinite(llava(input_ids=token, **{CACHE_ARGUMENT: cache}).logits).all()


@torch.no_grad()
def test_an_emptied_cache_serves_again(llava: Any) -> None:
    inputs = prompt(((3, "I", 5),))
    for cache in (DynamicCache(), StaticCache(llava.config.get_text_config(), max_cache_len=64)):
        with dropflow.attach(llava, ENCODES):
            first = llava(**inputs, **{CACHE_ARGUMENT: cache}).logits
            cache.reset()
            assert cache.get_seq_length() == 0
            assert torch.equal(llava(**inputs, **{CACHE_ARGUMENT: cache}).logits, first)


def test_dynamic_layers_are_taken_over_and_others_stay_what_they_are() -> None:
    model, inputs = tiny_llava(layers=2), prompt(((3, "I", 5),))
    with torch.no_grad(), dropflow.attach(model, ENCODES):
        for cache, kind in ((DynamicCache(), FlowLayer), (quantized(2), UniformLayer)):
            model(**inputs, **{CACHE_ARGUMENT: cache})
            assert [type(layer) for layer in cache.layers] == [kind, kind]
