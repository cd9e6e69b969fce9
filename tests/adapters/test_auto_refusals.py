"""What `auto` says of a model that it refuses is true, and without the refusal the model would run wrong or late."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from miniatures import tiny
from torch import Tensor

import dropflow
from dropflow.errors import UnsupportedCall, UnsupportedModel
from dropflow.testing.families.tiny import IMAGE, START, pixels
from dropflow.testing.probes import WINDOW
from dropflow_adapters.auto import Auto
from dropflow_lab.backbones.miniature import miniature

TOKENS = torch.tensor([[1, 5, 6, 7, 8, 9, 10]])


class Forced(Auto):
    """`auto` without its check of a model's shape."""

    def _misfit(self) -> str | None:
        return None


def dice(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def states_seen(model: Any, layers: Any, inputs: dict[str, Any]) -> tuple[int, Tensor]:
    """How many states each of `layers` receives, and the logits."""
    seen: list[int] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    assert len(set(seen)) == 1
    return seen[0], logits


def mllama(seed: int) -> dict[str, Any]:
    ids = TOKENS.clone()
    ids[0, 1] = IMAGE
    return {
        "input_ids": ids,
        "pixel_values": pixels(dice(seed), 1, 1, 1, 3, 24, 24),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, ids.shape[1], 1, 1, dtype=torch.long),
    }


def idefics(seed: int) -> dict[str, Any]:
    return {
        "input_ids": TOKENS,
        "attention_mask": torch.ones_like(TOKENS),
        "pixel_values": pixels(dice(seed), 1, 1, 3, 24, 24),
        "image_attention_mask": torch.ones(1, TOKENS.shape[1], 1, dtype=torch.long),
    }


def blip(seed: int) -> dict[str, Any]:
    return {"input_ids": TOKENS, "pixel_values": pixels(dice(seed), 1, 3, 24, 24)}


def captioned(seed: int) -> dict[str, Any]:
    return {"decoder_input_ids": TOKENS, "pixel_values": pixels(dice(seed), 1, 3, 24, 24)}


def flattened(seed: int) -> dict[str, Any]:
    places = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))[None]
    patches = torch.cat((places, pixels(dice(seed), 1, 16, 3 * 4 * 4)), -1)
    return {"decoder_input_ids": TOKENS, "flattened_patches": patches, "attention_mask": torch.ones(1, 16)}


def t5gemma2(seed: int) -> dict[str, Any]:
    prompt = torch.tensor([[1, START, *[IMAGE] * 9, 5]])
    return {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "decoder_input_ids": TOKENS,
        "pixel_values": pixels(dice(seed), 1, 3, 24, 24),
    }


READ_ELSEWHERE: dict[str, tuple[str, Callable[[int], dict[str, Any]], Callable[[Any], Any]]] = {
    "mllama": ("cross-attention", mllama, lambda model: model.model.language_model.layers),
    "idefics": ("cross-attention", idefics, lambda model: model.model.layers),
    "blip": ("cross-attention", blip, lambda model: model.text_decoder.bert.encoder.layer),
    "vision-encoder-decoder": ("encoder-decoder", captioned, lambda model: model.decoder.bert.encoder.layer),
    "pix2struct": ("encoder-decoder", flattened, lambda model: model.decoder.layer),
    "t5gemma2": ("encoder-decoder", t5gemma2, lambda model: model.model.decoder.layers),
}
"""Type -> a word of its refusal, inputs for a seed of the picture, and the decoder's layers."""


@pytest.mark.parametrize("kind", READ_ELSEWHERE)
def test_the_decoder_has_no_state_for_any_visual_token_and_yet_reads_the_image(kind: str) -> None:
    word, inputs, layers_of = READ_ELSEWHERE[kind]
    model = miniature(kind)
    with pytest.raises(UnsupportedModel, match=word):
        dropflow.attach(model, WINDOW)
    torch.manual_seed(0)
    for weight in model.parameters():  # gates of cross-attention begin at 0
        torch.nn.init.normal_(weight, 0, 0.3)
    states, logits = states_seen(model, layers_of(model), inputs(0))
    assert states == TOKENS.shape[1]
    _, other = states_seen(model, layers_of(model), inputs(1))
    assert not torch.equal(logits, other)


def refused_without_features(kind: str) -> Any:
    model = miniature(kind)
    with pytest.raises(UnsupportedModel, match="its core has no `get_image_features`"):
        dropflow.attach(model, WINDOW)
    return model


def test_git_puts_images_before_a_prompt_that_has_no_placeholders_for_them() -> None:
    model = refused_without_features("git")
    states, _ = states_seen(model, model.git.encoder.layer, blip(0))
    assert states == TOKENS.shape[1] + 37  # 6 x 6 patches and a CLS row


@torch.no_grad()
def test_kosmos_2_reads_no_token_ids_where_images_are() -> None:
    model = refused_without_features("kosmos-2")
    queries = model.config.latent_query_num
    ids = torch.cat((TOKENS, torch.full((1, queries), 20), TOKENS), 1)
    places = torch.zeros_like(ids)
    places[:, TOKENS.shape[1] : -TOKENS.shape[1]] = 1
    inputs = {"pixel_values": pixels(dice(0), 1, 3, 24, 24), "image_embeds_position_mask": places}
    assert torch.equal(model(input_ids=ids, **inputs).logits, model(input_ids=ids + places, **inputs).logits)


def test_mistral_4_takes_no_images() -> None:
    import inspect

    model = refused_without_features("mistral4")
    assert "pixel_values" not in inspect.signature(model.forward).parameters


def test_chameleon_would_be_refused_only_when_its_decoder_already_runs() -> None:
    model = miniature("chameleon")
    with pytest.raises(UnsupportedModel, match="its core is the text decoder itself"):
        dropflow.attach(model, WINDOW)
    with dropflow.attach(model, WINDOW, adapter=Forced), pytest.raises(UnsupportedCall, match="inside its own forward"):
        model(**tiny("chameleon").prompt()[0])


@pytest.mark.parametrize("kind", ["blip-2", "instructblip"])
def test_a_model_that_hands_embeddings_on_would_be_refused_only_when_it_generates(kind: str) -> None:
    model = miniature(kind)
    with pytest.raises(UnsupportedModel, match="its own `generate` hands embeddings to a text model inside it"):
        dropflow.attach(model, WINDOW)
    ids = torch.tensor([[1, *[IMAGE] * 8, 5, 6, 7]])
    inputs = {"input_ids": ids, "pixel_values": pixels(dice(0), 1, 3, 24, 24)}
    if kind == "instructblip":
        inputs |= {"qformer_input_ids": TOKENS}
    with dropflow.attach(model, WINDOW, adapter=Forced), pytest.raises(UnsupportedCall, match="called directly"):
        model.generate(**inputs, max_new_tokens=2)


@torch.no_grad()
def test_granite_vision_4_embeds_no_image_and_adds_all_of_them_between_layers() -> None:
    model = miniature("granite4_vision")
    with pytest.raises(UnsupportedModel, match="adds features of images between layers by `deepstack_features`"):
        dropflow.attach(model, WINDOW)
    core, text = model.model, model.model.language_model
    ids = torch.tensor([[1, *[IMAGE] * 4, 5, 6]])
    given: dict[str, Any] = {}
    text.register_forward_pre_hook(lambda _, __, kwargs: given.update(kwargs), with_kwargs=True)
    rows = [(layer, torch.ones(4, 32)) for layer in (0, 2)]
    core(input_ids=ids, mm_encoder_outputs={"image": SimpleNamespace(deepstack_features=rows)})
    assert not given["inputs_embeds"][ids == IMAGE].any()
    assert sorted(given["deepstack_features"]) == [0, 2]
