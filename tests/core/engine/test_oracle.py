"""Drop = mask: a pruned run equals a full-length run in which the dropped tokens are masked out per layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import HIDROP, MIXED, RAGGED, policy, prompt, relative_error, tiny_llava

import dropflow
from dropflow.testing import MaskedOracle

MODELS = {
    "llama": {},
    "llama without GQA": {"kv_heads": 4},
    "mistral": {"text": "mistral", "sliding_window": None},
    "mistral with a sliding window": {"text": "mistral", "sliding_window": 9},
    "qwen2": {"text": "qwen2"},
    "siglip": {"tower": "siglip"},
    "eager": {"attention": "eager"},
}


@contextmanager
def layer_inputs(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collects the hidden states that each decoder layer actually receives."""
    seen: list[torch.Tensor] = []
    layers = model.get_decoder()._modules["layers"]
    handles = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("which", [HIDROP, RAGGED], ids=["hidrop", "ragged"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_survivors_in_every_layer_and_logits_equal_the_masked_run(kind: str, side: str, which: dict[str, Any]) -> None:
    model, inputs = tiny_llava(**MODELS[kind]), prompt(side=side)
    with dropflow.attach(model, which) as flow, layer_inputs(model) as got:
        logits = model(**inputs).logits
        live = flow.live()
    with MaskedOracle(model, live) as oracle:
        expected = model(**inputs, use_cache=False).logits
    assert not live.all(), "the policy dropped nothing, so the comparison would prove nothing"
    real = inputs["attention_mask"].bool()
    assert relative_error(logits[real], expected[real]) < 1e-5
    assert len(got) == len(oracle.hidden)
    compacted = False  # padding stays in place until the first token goes
    for layer, states in enumerate(got):
        compacted |= not torch.equal(live[layer], real)
        for sample in range(len(MIXED)):
            own = live[layer, sample]
            slots = states[sample][-int(own.sum()) :] if compacted else states[sample][own]
            reference = oracle.hidden[layer][sample][own]
            assert relative_error(slots, reference) < 1e-5, f"layer {layer}, sample {sample}"


@pytest.mark.parametrize("kind", ["llama", "llama without GQA", "mistral", "mistral with a sliding window", "eager"])
@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": False},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
        {"do_sample": False, "num_beams": 3},
    ],
    ids=["greedy", "sampling", "beams"],
)
@torch.no_grad()
def test_generated_tokens_equal_the_masked_run_without_cache(kind: str, mode: dict[str, Any]) -> None:
    model, inputs = tiny_llava(**MODELS[kind]), prompt()
    budget = {"max_new_tokens": 5, "min_new_tokens": 5}
    for which in (HIDROP, RAGGED):
        with dropflow.attach(model, which) as flow:
            torch.manual_seed(5)
            tokens = model.generate(**inputs, **mode, **budget)
            live = flow.live()[:, :: mode.get("num_return_sequences", mode.get("num_beams", 1))]
        with MaskedOracle(model, live):
            torch.manual_seed(5)
            expected = model.generate(**inputs, **mode, **budget, use_cache=False)
        torch.manual_seed(5)
        assert torch.equal(tokens, expected)
        assert not torch.equal(tokens, model.generate(**inputs, **mode, **budget)), "pruning changed no token"


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    """A random window with up to three random keeps inside it."""
    entry = draw(st.integers(0, 4))
    exits = draw(st.integers(entry + 1, 6))
    boundaries = draw(st.lists(st.integers(entry, exits - 1), max_size=3, unique=True))
    keeps = sorted(draw(st.lists(st.integers(0, 16), min_size=len(boundaries), max_size=len(boundaries))), reverse=True)
    stages: dict[str, Any] = {
        "inject": {"use": "hidrop/late-injection", "at": entry},
        "exit": {"use": "hidrop/early-exit", "at": exits},
    }
    if boundaries:
        stages["pyramid"] = {"use": "hidrop/concave-pyramid", "keep": dict(zip(sorted(boundaries), keeps, strict=True))}
    return stages


PARTS = st.one_of(st.integers(1, 6), st.just("I"))
SHARED: list[Any] = []


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    schedules(),
    st.lists(st.lists(PARTS, min_size=1, max_size=4), min_size=1, max_size=3),
    st.sampled_from(["left", "right"]),
)
@torch.no_grad()
def test_any_schedule_on_any_batch_equals_the_masked_run(
    stages: dict[str, Any], samples: list[list[int | str]], side: str
) -> None:
    if not SHARED:
        SHARED.append(tiny_llava())
    model, inputs = SHARED[0], prompt([[*parts, 2] for parts in samples], side=side)
    with dropflow.attach(model, policy(**stages)) as flow:
        logits = model(**inputs).logits
        live = flow.live() if "pixel_values" in inputs else torch.ones(6, *inputs["input_ids"].shape, dtype=torch.bool)
    with MaskedOracle(model, live):
        expected = model(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    assert relative_error(logits[real], expected[real]) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_follows_the_masked_run(dtype: torch.dtype) -> None:
    model = tiny_llava().to(dtype)
    inputs = prompt()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with dropflow.attach(model, HIDROP) as flow:
        logits = model(**inputs).logits
        live = flow.live()
    with MaskedOracle(model, live):
        expected = model(**inputs, use_cache=False).logits
    assert logits.dtype == dtype
    real = inputs["attention_mask"].bool()
    assert relative_error(logits[real].float(), expected[real].float()) < (0.05 if dtype == torch.bfloat16 else 0.01)
