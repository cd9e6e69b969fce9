"""The layers of a model run by hand on as many tokens as a call had, without an engine: what a machine can save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from dropflow.backbone.versions import CACHE_ARGUMENT


@dataclass(frozen=True)
class LayerShape:
    """The work of one decoder layer in a call."""

    samples: int
    tokens: int
    """Tokens of each sample that the layer ran on, padding included."""
    entries: int
    """Entries of each sample that they attended to, their own included."""


def shapes_in(model: Any, run: Callable[[], object]) -> list[LayerShape]:
    """Return the work of each decoder layer of `model` in one call of `run`."""
    shapes: list[LayerShape] = []

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        del layer, output
        hidden = args[0] if args else kwargs["hidden_states"]
        entries = kwargs[CACHE_ARGUMENT].layers[len(shapes)].keys.shape[-2]
        shapes.append(LayerShape(hidden.shape[0], hidden.shape[1], int(entries)))

    with ExitStack() as hooks:
        for layer in model.model.language_model.layers:
            hooks.callback(layer.register_forward_hook(note, with_kwargs=True).remove)
        run()
    return shapes


def bare(
    model: Any, shapes: Sequence[LayerShape], pictures: Mapping[str, Tensor] | None, *, masked: bool = False
) -> Callable[[], None]:
    """Return a callable that runs the decoder layers on random states of these shapes, and the LM head on one token.

    With `pictures`, what the processor gave for them, the vision side runs first. Entries beyond the tokens' own are in
    the cache already. With `masked`, every layer gets a mask, as where samples are padded. `model` has no policy
    attached.
    """
    text = model.model.language_model
    weight = text.layers[0].self_attn.k_proj.weight
    heads, width = text.config.num_key_value_heads, text.layers[0].self_attn.head_dim
    made = {"device": weight.device, "dtype": weight.dtype}
    states = {one: torch.randn(one.samples, one.tokens, weight.shape[1], **made) for one in shapes}
    held = {one: torch.randn(one.samples, heads, one.entries - one.tokens, width, **made) for one in shapes}
    axes = (3, 1) if "mrope_section" in text.config.rope_parameters else (1,)  # positions of Qwen have three axes
    flash = text.config._attn_implementation.startswith("flash")  # takes no such mask: tokens come last by itself
    masks = {one: None if flash else _mask(one, weight.device, masked=masked) for one in shapes}

    def run() -> None:
        if pictures is not None:
            model.model.get_image_features(**pictures)
        cache, hidden = DynamicCache(config=text.config), states[shapes[0]]
        angles = {
            one: text.rotary_emb(states[one], torch.arange(one.tokens, device=weight.device).expand(*axes, -1))
            for one in dict.fromkeys(shapes)
        }
        for number, (one, layer) in enumerate(zip(shapes, text.layers, strict=True)):
            if one.entries > one.tokens:
                cache.layers[number].lazy_initialization(held[one], held[one])
                cache.layers[number].keys = cache.layers[number].values = held[one]
            fits = hidden.shape[1] == one.tokens
            given = {"attention_mask": masks[one], "position_embeddings": angles[one], CACHE_ARGUMENT: cache}
            hidden = layer(hidden if fits else states[one], **given)
        model.lm_head(text.norm(hidden[:, -1:]))

    return run


def _mask(shape: LayerShape, device: torch.device, *, masked: bool) -> Tensor | None:
    """The mask (1, 1, tokens, entries) of tokens that come last; `None` where attention is causal without one."""
    ahead = shape.entries - shape.tokens
    if not (ahead or masked):
        return None
    return torch.ones(shape.tokens, shape.entries, dtype=torch.bool, device=device).tril(ahead)[None, None]
