"""What the published code of FastV, PyramidDrop, VTW and SparseVLM computed, and payloads that show it to a stage."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dropflow import Entry, PruneCall, Stage, StageContext, Window
from dropflow.units import BackboneShape, Scale
from dropflow_adapters.llava import Llava

DATA = Path(__file__).parents[1] / "data" / "methods"


@functools.cache
def golden(name: str) -> dict[str, Tensor]:
    """The arrays of one recorded file."""
    with np.load(DATA / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def stage_of(kind: type[Stage[Any]], *, layers: int = 32, visual_tokens: int | None = 576, **options: Any) -> Any:
    """A stage as a policy would make it."""
    context = StageContext("stage", Scale(BackboneShape(layers, visual_tokens)), Window(0, layers))
    return kind(kind.Options(**options), context)


def prune_call(
    boundary: int, start: int, images: int, tokens: int, attention: Callable[[int, Tensor], Tensor], batch: int = 1
) -> PruneCall:
    """A payload of a prompt with one image of `images` tokens from `start` on, and text around it."""
    index = torch.arange(tokens).expand(batch, -1)
    visual = (index >= start) & (index < start + images)
    sample = torch.arange(batch)[:, None].expand(-1, tokens)
    image = torch.where(visual, sample, -1)
    return PruneCall(
        boundary=boundary,
        hidden=torch.zeros(batch, tokens, 1),
        index=index,
        valid=torch.ones_like(visual),
        image_id=image,
        text=~visual,
        protected=torch.zeros_like(visual),
        image_sizes=(images,) * batch,
        instruction_slots=index[:, -1:],
        instruction_valid=torch.ones(batch, 1, dtype=torch.bool),
        window=Window(0, 32),
        entry=Entry(torch.zeros(batch, tokens, 1), image),
        attention=attention,
        tapped=_nothing_tapped,
        final_norm=None,
    )


def _nothing_tapped(layer: int) -> Any:
    raise AssertionError(f"layer {layer} is read")


class Runs(Llava):
    """Images are runs of visual tokens, of any number: the recorded ones came out of no tower."""

    @property
    def tokens_per_image(self) -> int | None:
        return None


def recorded_llama(width: int, heads: int, weights: dict[str, Tensor], *, layers: int, **sizes: Any) -> Any:
    """A LLaVA around a Llama with these weights (names of `LlamaForCausalLM`); its tower is never asked."""
    text = LlamaConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_hidden_layers=layers,
        rms_norm_eps=1e-6,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **sizes,
    )
    tower = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=4, patch_size=2
    )
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=tower, image_token_id=1)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    renamed = {
        name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1): value
        for name, value in weights.items()
    }
    _, unexpected = model.load_state_dict(renamed, strict=False)
    if unexpected:
        raise ValueError(f"the recorded weights do not fit: {unexpected}")
    return model
