"""What cannot be correct is refused with path and remedy, and afterwards the model gives its plain output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import HIDROP, policy, prompt, relative_error, tiny_llava
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer, StaticSlidingWindowLayer

import dropflow
from dropflow import Stage, hookimpl
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.errors import DropflowError, MissingImage, PolicyError, UnsupportedCall, UnsupportedModel
from dropflow.testing import AbsentOracle, MaskedOracle, tiny_models


class NoStage:
    """A class that is not a stage."""


class Hookless(Stage[Any]):
    """A stage whose author has written everything but a hook."""


class Misspelt(Stage[Any]):
    """A stage that needs a fact which does not exist."""

    needs = frozenset({"vision_layer"})

    @hookimpl
    def inject(self, call: Any) -> int:  # noqa: ARG002
        return 1


def pyramid(keep: dict[Any, Any], **more: Any) -> dict[str, Any]:
    return {"name": "test", **more, "stages": {"pyramid": {"use": "hidrop/concave-pyramid", "keep": keep}}}


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (
            policy(a={"use": "hidrop/early-exti", "at": 3}),
            r"stages\.a\.use: no stage named 'hidrop/early-exti'; did you mean 'hidrop/early-exit'",
        ),
        (
            policy(a={"use": "hidrop/early-exit", "ta": 3}),
            r"(?s)stages\.a\.at: field required.*stages\.a\.ta: unknown option; did you mean 'at'",
        ),
        (
            pyramid({9: 3}),
            r"stages\.pyramid\.keep\.9: expected a boundary from 0 to 6 \(the model has 6 layers\), got 9",
        ),
        (
            pyramid({6: 3}),
            r"stages\.pyramid\.keep\.6: prunes at boundary 6, but vision is live only from 0 to before 6",
        ),
        (
            pyramid({2: 3, 4: 5}),
            r"stages\.pyramid\.keep\.4: keeps 5 visual tokens, more than the 3 left by stages\.pyramid\.keep\.2",
        ),
        (
            pyramid({2: 17}),
            r"stages\.pyramid\.keep\.2: keeps 17 visual tokens, more than the 16 left by the image at entry",
        ),
        (
            pyramid({2: 3}, tuned_for={"layers": 32, "visual_tokens": 16}),
            r"stages\.pyramid\.keep\.2: the absolute number 2 was tuned for 32 layers.*set `rescale: true`",
        ),
        (
            pyramid({0.5: 3}, tuned_for={"layers": 6, "visual_tokens": 576}),
            r"keep\.0\.5: the absolute number 3 was tuned for 576 visual tokens, but the model has 16",
        ),
        (
            policy(a={"use": NoStage}),
            r"^stages\.a\.use: expected the name of a stage or a subclass of `dropflow\.Stage`",
        ),
        (policy(a={"use": Hookless}), r"^stages\.a: has no hook; define one: encode, inject, prune, exit"),
        (
            policy(a={"use": Misspelt}),
            r"^stages\.a: needs 'vision_layer', which is no fact \(`dropflow\.FACTS`\); did you mean 'vision_layers'",
        ),
        ("hidrop-46", r"hidrop-46: no such policy; did you mean 'hidrop-"),
        (
            policy(i={"use": "hidrop/late-injection", "at": 4}, e={"use": "hidrop/early-exit", "at": 4}),
            r"stages\.i: vision would enter at boundary 4 but is gone from 4 on",
        ),
        ({"stages": {}, "postions": "persistent", "name": "x"}, r"postions: unknown option; did you mean 'positions'"),
    ],
)
def test_a_policy_that_cannot_run_is_refused_on_attach(llava: Any, which: Any, message: str) -> None:
    inputs = prompt()
    with torch.no_grad():
        plain = llava(**inputs).logits
        with pytest.raises(PolicyError, match=message):
            dropflow.attach(llava, which)
        assert torch.equal(llava(**inputs).logits, plain)


def test_a_file_that_builds_python_objects_is_refused(llava: Any, tmp_path: Path) -> None:
    trap = tmp_path / "trap.yaml"
    made = tmp_path / "made"
    trap.write_text(
        f"name: x\nstages: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{made}]]\n"
    )
    with pytest.raises(PolicyError, match=r"trap\.yaml: not plain YAML"):
        dropflow.attach(llava, trap)
    assert not made.exists()


def small_cache(model: Any) -> dict[str, Any]:
    return {CACHE_ARGUMENT: StaticCache(model.config.text_config, max_cache_len=8)}


def windows(_: Any) -> dict[str, Any]:
    return {CACHE_ARGUMENT: Cache(layers=[StaticSlidingWindowLayer(64, sliding_window=16) for _ in range(4)])}


def quantized_cache(_: Any) -> dict[str, Any]:
    class Quantized(QuantizedLayer):
        def __init__(self) -> None: ...
        def _quantize(self, tensor: Any, axis: int) -> Any: ...
        def _dequantize(self, tensor: Any) -> Any: ...

    cache = DynamicCache()
    cache.layers.append(Quantized())
    return {CACHE_ARGUMENT: cache}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            small_cache,
            UnsupportedCall,
            r"(past_key_values|cache): a static cache of 8 tokens cannot hold \d+; .* larger max_cache_len",
        ),
        (windows, UnsupportedModel, "every layer of this static cache has a sliding window"),
        (quantized_cache, UnsupportedModel, r"(past_key_values|cache)\.layers\[0\]: a cache layer of type Quantized"),
        (lambda _: {CACHE_ARGUMENT: ((1, 2),)}, UnsupportedModel, "expected a transformers DynamicCache, got tuple"),
        (
            lambda _: {"output_hidden_states": True},
            UnsupportedCall,
            "output_hidden_states: not available under a policy",
        ),
        (lambda _: {"output_attentions": True}, UnsupportedCall, "output_attentions: .* `attention_rows`"),
        (
            lambda _: {"pixel_values": None},
            MissingImage,
            "pixel_values: missing, but the prompt has image placeholders",
        ),
    ],
    ids=["small", "windows", "quantized", "legacy", "hidden states", "attentions", "no image"],
)
def test_a_call_that_cannot_be_right_is_refused_before_the_forward(
    llava: Any, arguments: Callable[[Any], dict[str, Any]], error: type[DropflowError], message: str
) -> None:
    inputs, ran = prompt(), []
    with torch.no_grad():
        plain = llava(**inputs).logits
        handle = llava.model.vision_tower.register_forward_pre_hook(lambda *_: ran.append(1))
        with dropflow.attach(llava, HIDROP):
            expected = llava(**inputs).logits
            ran.clear()
            with pytest.raises(error, match=message):
                llava(**(inputs | arguments(llava)))
            assert not ran, "something ran before the refusal"
            assert torch.equal(llava(**inputs).logits, expected)
        handle.remove()
        assert torch.equal(llava(**inputs).logits, plain)


@torch.no_grad()
def test_flex_attention_is_refused() -> None:
    model = tiny_llava()
    model.get_decoder().config._attn_implementation = "flex_attention"
    with (
        dropflow.attach(model, HIDROP),
        pytest.raises(UnsupportedModel, match="flex_attention masks cannot be gathered"),
    ):
        model(**prompt())


def test_a_model_without_an_adapter_is_refused() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    )
    with pytest.raises(
        UnsupportedModel,
        match=r"no adapter for a model of type 'llama', and `auto` cannot serve it: its core has no `get_image",
    ):
        dropflow.attach(model, HIDROP)


def test_a_misspelt_hook_is_an_error(llava: Any) -> None:
    class Misspelt(Stage[Any]):
        @hookimpl
        def prun(self, call: Any) -> None: ...

    with pytest.raises(PolicyError, match=r"^stages\.a: marks prun with hookimpl.*did you mean .prune."):
        dropflow.attach(llava, policy(a={"use": Misspelt}))


def test_report_before_any_image(llava: Any) -> None:
    with dropflow.attach(llava, HIDROP) as flow, pytest.raises(UnsupportedCall, match="no prompt with images"):
        flow.report()


@torch.no_grad()
def test_report_of_a_policy_without_stages(llava: Any) -> None:
    with dropflow.attach(llava, policy()) as flow:
        llava(**prompt())
        with pytest.raises(UnsupportedCall, match="'test' has no stages, so nothing is recorded"):
            flow.report()


@torch.no_grad()
def test_reading_a_layer_that_was_not_tapped_is_refused(llava: Any) -> None:
    class Reads(Stage[Any]):
        prune_at = (3,)

        @hookimpl
        def prune(self, call: dropflow.PruneCall) -> None:
            call.attention_rows(1, call.instruction_slots)

    with (
        dropflow.attach(llava, policy(a={"use": Reads})),
        pytest.raises(DropflowError, match="list it in the stage's `taps`"),
    ):
        llava(**prompt())


def test_what_holds_a_model_or_goes_with_one_is_told_what_to_pass(llava: Any) -> None:
    class Pipeline:
        model = llava

    class Engine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = llava

    expected = {
        r"^expected a transformers model, got Pipeline; pass its `model` \(LlavaForCond": Pipeline(),
        r"^expected a transformers model, got Engine; pass its `module` \(LlavaFor.*, and call that$": Engine(),
        r"got LlavaConfig; pass what `from_pretrained` of the model's class returns": llava.config,
        r"got str; pass what `from_pretrained`": "llava-hf/llava-1.5-7b-hf",
    }
    for message, given in expected.items():
        for use in (lambda one: dropflow.attach(one, HIDROP), dropflow.detach, dropflow.flow_of):
            with pytest.raises(UnsupportedModel, match=message):
                use(given)


@pytest.mark.parametrize("family", sorted({"aya_vision", "lfm3_vl"} & tiny_models().keys()))
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_images_after_more_text_than_a_sliding_window_holds(family: str, kind: str) -> None:
    """Text runs without the engine, so the cache's own layers drop what leaves the window."""
    adapter, tiny = tiny_models()[family]
    model, (shown, _) = tiny.model(), tiny.prompt([(1, "I", 3)])
    text = model.config.get_text_config()
    which = policy(half={"use": "control/stride", "keep": {1: 0.5}})

    def second(more: int) -> torch.Tensor:
        cache = DynamicCache(config=text) if kind == "dynamic" else StaticCache(config=text, max_cache_len=64)
        count = text.sliding_window + more
        model(input_ids=torch.arange(3, 3 + count)[None], **{CACHE_ARGUMENT: cache})
        logits: torch.Tensor = model(**shown | {"attention_mask": None}, **{CACHE_ARGUMENT: cache}).logits
        return logits

    with dropflow.attach(model, which, adapter=adapter) as flow:
        found = second(-1)
        live = flow.live()
        for more in (0, 1):
            seen = text.sliding_window + more
            message = rf"has already dropped tokens \({seen} seen, .* and bring an image in it"
            with pytest.raises(UnsupportedModel, match=message):
                second(more)
        assert torch.equal(second(-1), found)
    ids = torch.cat((torch.arange(3, 2 + text.sliding_window)[None], shown["input_ids"]), 1)
    before = {name: value for name, value in shown.items() if name not in ("input_ids", "attention_mask")}
    oracle = MaskedOracle if family == "aya_vision" else AbsentOracle
    with oracle(model, live, adapter):
        expected = model(**before, input_ids=ids, use_cache=False).logits[:, -found.shape[1] :]
    assert relative_error(found, expected) < 1e-5
