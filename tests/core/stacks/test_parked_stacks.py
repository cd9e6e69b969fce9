"""Parked entries under other attention kernels, on two devices, and with compiled models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counted_graphs import nothing_compiled
from flash_stand_in import registered
from tiny import policy, prompt, relative_error, tiny_llava
from torch import Tensor
from transformers import DynamicCache
from two_devices import HOST, SECOND, TwoDevices, spread

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.model.attention import QueryKey
from dropflow.testing import tiny_models

READ = {"use": "visionpulse/decode-read", "at": 2, "tau": 0.4, "budget_min": 0.2, "budget_max": 0.5}
READS = policy(read=READ)
BOTH = policy(prune={"use": "hidrop/concave-pyramid", "keep": {1: 12, 4: 7}}, read=READ)
TOKENS: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def decoded(model: Any, which: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    cache, mask = DynamicCache(), inputs["attention_mask"]
    with dropflow.attach(model, which):
        found = [model(**inputs, **{CACHE_ARGUMENT: cache}).logits[:, -1]]
        for step in range(4):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            token = torch.full((len(mask), 1), 5 + step)
            found.append(model(input_ids=token, attention_mask=mask, **{CACHE_ARGUMENT: cache}).logits[:, -1])
    return found


@pytest.mark.parametrize("which", [READS, BOTH], ids=["reads", "prunes and reads"])
@torch.no_grad()
def test_kernels_with_two_dimensional_masks_read_the_same(which: Any) -> None:
    with registered() as name:
        model = tiny_llava()
        model.get_decoder().config._attn_implementation = name
        for inputs in (prompt(((3, "I", 5),)), prompt(((3, "I", 5), ("I", 2, "I", 9)))):
            expected = decoded(tiny_llava(), which, inputs)
            for own, other in zip(decoded(model, which, inputs), expected, strict=True):
                assert relative_error(own, other) < 1e-5


@torch.no_grad()
def test_a_window_that_the_kernel_enforces_counts_all_tokens() -> None:
    """What a layer reads is cut to its window before it is gathered, since the kernel counts what it gets."""
    from dropflow.engine.decoder.step_reading import StepReading

    model, inputs = tiny_llava(), prompt(((3, "I", 5),))
    kept: list[int] = []
    decide = StepReading.of

    def windowed(self: StepReading, number: int, seen: QueryKey) -> Any:
        import dataclasses

        found = decide(self, number, dataclasses.replace(seen, sliding_window=9) if number == 4 else seen)
        kept.append(seen.key.shape[2] if found is None else found.key.shape[2])
        return found

    with pytest.MonkeyPatch.context() as patch, dropflow.attach(model, policy(read=READ | {"fixed": 0.5})):
        patch.setattr(StepReading, "of", windowed)
        cache = DynamicCache()
        model(**inputs, **{CACHE_ARGUMENT: cache})
        model(input_ids=torch.tensor([[5]]), **{CACHE_ARGUMENT: cache})
    whole = inputs["input_ids"].shape[1] + 1 - 8
    text = 5 + 1  # the last tokens of the prompt and the new one, within 9 tokens before the end
    assert kept[:2] == [whole, whole]
    assert kept[3] == whole
    assert text <= kept[2] <= 9


@pytest.mark.parametrize("there", [(3, 4, 5), (2,), (0, 1)])
@torch.no_grad()
def test_layers_on_two_devices(there: tuple[int, ...]) -> None:
    text = "model.language_model"
    names = [f"{text}.layers.{number}" for number in range(6)]
    rest = ["model.vision_tower", "model.multi_modal_projector", f"{text}.embed_tokens", f"{text}.norm", "lm_head"]
    places = dict.fromkeys([*names, *rest, f"{text}.rotary_emb"], HOST)
    places |= {names[number]: SECOND for number in there}
    inputs = prompt(((3, "I", 5), ("I", 2, "I", 9)))
    model = spread(tiny_llava(), places)
    for which in (READS, BOTH):
        expected = decoded(tiny_llava(), which, inputs)
        with TwoDevices():
            found = decoded(model, which, inputs)
        for own, other in zip(found, expected, strict=True):
            assert relative_error(own, other) < 1e-5


@pytest.mark.parametrize("way", ["layers", pytest.param("whole", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiled_models_read_the_same(way: str) -> None:
    inputs = prompt(((3, "I", 5),))
    expected = decoded(tiny_llava(layers=4), READS, inputs)
    with nothing_compiled():
        model = tiny_llava(layers=4)
        if way == "layers":
            for layer in model.get_decoder().layers:
                layer.compile(backend="eager", dynamic=True)
        else:
            model.compile(backend="eager")
        found = decoded(model, READS, inputs)
    for own, other in zip(found, expected, strict=True):
        assert relative_error(own, other) < 1e-5


@torch.no_grad()
def test_half_precision_masks_and_soft_caps() -> None:
    """Logits are float32 with the cap and the mask of the model, whatever its dtype."""
    _, tiny = tiny_models()["gemma3"]
    model, (inputs, _) = tiny.model().to(torch.bfloat16), tiny.prompt(((3, "I", 5),))
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    at = {"at": 0.4, "fixed": 0.25}
    with dropflow.attach(model, policy(read=READ | at)) as flow:
        first = model.generate(**inputs, **TOKENS)
        assert torch.equal(model.generate(**inputs, **TOKENS), first)
        rows = flow.report().layers
    assert rows[-1].kv_entries_read < rows[0].kv_entries_read
