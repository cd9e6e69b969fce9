"""Sliding windows that a kernel enforces by counting entries: right where a mask can tell them, refused elsewhere."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from flash_stand_in import registered
from tiny import RAGGED, policy, prompt, relative_error, tiny_llava
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

import dropflow
from dropflow.backbone.mixers import windows_of
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.errors import UnsupportedCall
from dropflow.testing import tiny_models

TWO = ((3, "I", 5), ("I", 2, "I", 9))
LENGTH = 44
"""Tokens of the longer sample."""
SLIDING: dict[str, dict[str, Any]] = {
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
}


def model_of(text: str, window: int, attention: str) -> Any:
    model = tiny_llava(text=text, attention="eager", sliding_window=window, **SLIDING[text])
    model.get_decoder().config._attn_implementation = attention
    return model


def decoded(model: Any, steps: int = 9) -> tuple[list[Tensor], Any, Tensor]:
    inputs, cache = prompt(TWO), DynamicCache()
    mask = inputs["attention_mask"]
    found = [model(**inputs, **{CACHE_ARGUMENT: cache}).logits[:, -1]]
    for step in range(steps):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        token = torch.full((len(mask), 1), 5 + step)
        found.append(model(input_ids=token, attention_mask=mask, **{CACHE_ARGUMENT: cache}).logits[:, -1])
    return found, cache, mask


@pytest.mark.parametrize("window", [LENGTH, LENGTH + 3])
@pytest.mark.parametrize("text", SLIDING)
@torch.no_grad()
def test_decode_steps_see_a_window_of_logical_tokens(text: str, window: int) -> None:
    with dropflow.attach(model := model_of(text, window, "eager"), RAGGED):
        expected, _, _ = decoded(model)
    with dropflow.attach(model := model_of(text, 512, "eager"), RAGGED):
        unbounded, _, _ = decoded(model)
    assert relative_error(unbounded[-1], expected[-1]) > 1e-3
    with registered() as name, dropflow.attach(model := model_of(text, window, name), RAGGED):
        found, _, _ = decoded(model)
    for step, (own, other) in enumerate(zip(found, expected, strict=True)):
        assert relative_error(own, other) < 1e-5, step


@pytest.mark.parametrize("text", SLIDING)
@torch.no_grad()
def test_a_prompt_longer_than_the_window_is_refused_before_any_layer_runs(text: str) -> None:
    ran: list[int] = []
    with registered() as name:
        model = model_of(text, LENGTH - 1, name)
        model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
        told = f"layer 2: 'flash_cpu' counts the entries .* sliding window of {LENGTH - 1}.* there are {LENGTH} tokens"
        with dropflow.attach(model, RAGGED), pytest.raises(UnsupportedCall, match=told):
            model(**prompt(TWO))
    assert not ran


@torch.no_grad()
def test_a_turn_of_text_beyond_the_window_is_refused_before_any_layer_runs() -> None:
    ran: list[int] = []
    with registered() as name, dropflow.attach(model := model_of("mistral", LENGTH + 5, name), RAGGED):
        _, cache, mask = decoded(model, 3)
        model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
        mask = torch.nn.functional.pad(mask, (0, 3), value=1)
        turn = {"input_ids": torch.full((2, 3), 7), "attention_mask": mask, CACHE_ARGUMENT: cache}
        with pytest.raises(UnsupportedCall, match=rf"layer 2: .* there are {LENGTH + 6} tokens"):
            model(**turn)
        assert not ran
        assert cache.get_seq_length() == LENGTH + 3


@torch.no_grad()
def test_drops_after_the_last_layer_with_a_window_are_exact() -> None:
    """Of Qwen2's layers those from `max_window_layers` on have windows, here the last; it runs before the exit."""
    late = policy(exit={"use": "hidrop/early-exit", "at": 6})
    with dropflow.attach(model := model_of("qwen2", 12, "eager"), late):
        expected, _, _ = decoded(model)
    with registered() as name, dropflow.attach(model := model_of("qwen2", 12, name), late):
        found, _, _ = decoded(model)
    assert all(relative_error(own, other) < 1e-5 for own, other in zip(found, expected, strict=True))


def _spy(seen: dict[int, int | None]) -> Any:
    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen[module.layer_idx] = kwargs.get("sliding_window")  # type: ignore[index]  # a number
        return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)

    return attention


@pytest.mark.parametrize("family", tiny_models())
@torch.no_grad()
def test_the_windows_of_a_family_are_those_that_its_layers_tell_the_kernel(family: str) -> None:
    adapter, tiny = tiny_models()[family]
    model, seen = tiny.model("eager"), dict[int, int | None]()
    config: Any = adapter(model).text.config
    config._attn_implementation = "spy"
    AttentionInterface.register("spy", _spy(seen))
    AttentionMaskInterface.register("spy", eager_mask)
    try:
        model(**tiny.prompt()[0])
    finally:
        AttentionInterface._global_mapping.pop("spy")
        AttentionMaskInterface._global_mapping.pop("spy")
    told = {layer: window for layer, window in seen.items() if window is not None}
    assert told == windows_of(config)
