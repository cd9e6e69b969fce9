"""Models that accelerate offloads run under a policy as they do in memory, and keep accelerate's hooks afterwards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from seven import OFTEN, SEVEN, Outcome, outcome
from tiny import HIDROP, prompt, tiny_llava
from transformers import LlavaForConditionalGeneration

import dropflow

CPU = torch.device("cpu")
INPUTS = prompt()
PARTS = {
    "model.vision_tower": "disk",
    "model.multi_modal_projector": "cpu",
    "model.language_model.embed_tokens": "disk",
    **{f"model.language_model.layers.{number}": "disk" if number % 2 else "cpu" for number in range(6)},
    "model.language_model.norm": "disk",
    "model.language_model.rotary_emb": "cpu",
    "lm_head": "disk",
}
"""Every other layer stays in memory."""


def to_memory(model: Any, folder: Path) -> Any:  # noqa: ARG001
    return cpu_offload(model, CPU)


def with_buffers(model: Any, folder: Path) -> Any:  # noqa: ARG001
    return cpu_offload(model, CPU, offload_buffers=True)


def layer_by_layer(model: Any, folder: Path) -> Any:  # noqa: ARG001
    return cpu_offload(model, CPU, preload_module_classes=["LlamaDecoderLayer"])


def to_disk(model: Any, folder: Path) -> Any:
    return disk_offload(model, folder, CPU)


def by_map(model: Any, folder: Path) -> Any:
    skipped = model._skip_keys_device_placement
    return dispatch_model(model, PARTS, main_device="cpu", offload_dir=folder, skip_keys=skipped)


def as_loaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder / "saved")
    load = LlavaForConditionalGeneration.from_pretrained
    return load(folder / "saved", device_map=PARTS, offload_folder=folder / "offloaded").eval()


WAYS: Mapping[str, Callable[[Any, Path], Any]] = {
    way.__name__: way for way in (to_memory, with_buffers, layer_by_layer, to_disk, by_map, as_loaded)
}


@pytest.fixture(scope="module", params=WAYS)
def offloaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of which most parameters are elsewhere while no module runs that needs them."""
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    model = WAYS[request.param](tiny_llava(), tmp_path_factory.mktemp(request.param))
    assert on_meta(model) > 100
    return model


@pytest.fixture(scope="module")
def expected() -> dict[str, Outcome]:
    """Of a model in memory, by policy; "plain" is without one."""
    model = tiny_llava()
    return {name: outcome(model, which, INPUTS) for name, which in SEVEN.items()} | {
        "plain": outcome(model, None, INPUTS)
    }


def on_meta(model: Any) -> int:
    return sum(weight.device.type == "meta" for weight in model.parameters())


def instance_attributes(model: Any) -> dict[str, dict[str, Any]]:
    """What stands in the instances of the modules, such as accelerate's `forward`, by name."""
    own = ("forward", "_old_forward", "_hf_hook", "training")
    return {name: {key: vars(module).get(key) for key in own} for name, module in model.named_modules()}


@pytest.mark.parametrize("which", OFTEN)
def test_an_offloaded_model_gives_what_the_model_in_memory_gives(
    offloaded: Any, expected: dict[str, Outcome], which: str
) -> None:
    before, weights = instance_attributes(offloaded), on_meta(offloaded)
    assert outcome(offloaded, SEVEN[which], INPUTS).differences(expected[which]) == []
    assert "logits" in expected[which].differences(expected["plain"])
    assert instance_attributes(offloaded) == before
    assert on_meta(offloaded) == weights, "the policy keeps weights in memory"
    with torch.no_grad():
        assert torch.equal(offloaded(**INPUTS).logits, expected["plain"].logits)


@torch.no_grad()
def test_a_model_may_be_offloaded_and_fetched_back_while_the_policy_is_attached(expected: dict[str, Outcome]) -> None:
    model = tiny_llava()
    with dropflow.attach(model, HIDROP):
        offloaded = cpu_offload(model, CPU)
        assert on_meta(offloaded) == len(list(model.parameters()))
        assert torch.equal(offloaded(**INPUTS).logits, expected["hidrop"].logits)
        remove_hook_from_module(model, recurse=True)
        assert on_meta(model) == 0
        assert torch.equal(model(**INPUTS).logits, expected["hidrop"].logits)
        cpu_offload(model, CPU)
    assert outcome(model, None, INPUTS).differences(expected["plain"]) == []


@torch.no_grad()
def test_a_forward_that_fails_while_ranking_leaves_the_offloaded_model_whole(expected: dict[str, Outcome]) -> None:
    model = cpu_offload(tiny_llava(), CPU)
    before, asked = instance_attributes(model), model.get_decoder().layers[2].self_attn.k_proj

    def fail(*_: Any) -> None:
        raise MemoryError("no room for a weight")

    with dropflow.attach(model, HIDROP):
        hook, asked._hf_hook.pre_forward = asked._hf_hook.pre_forward, fail
        with pytest.raises(MemoryError, match="no room"):
            model(**INPUTS)
        asked._hf_hook.pre_forward = hook
        assert instance_attributes(model) == before
        assert torch.equal(model(**INPUTS).logits, expected["hidrop"].logits)
    assert outcome(model, None, INPUTS).differences(expected["plain"]) == []
