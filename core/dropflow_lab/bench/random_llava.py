"""The models for engine benchmarks: random weights, wide enough that computation outweighs overhead."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow_lab.bench.qwen_subject import qwen_model, qwen_pictures
from dropflow_lab.errors import InputError, shortened
from dropflow_lab.measure.machine import check_device

_IMAGE_TOKEN = 1


@dataclass(frozen=True)
class SubjectShape:
    """Sizes of the model and of its prompt; by default the vision tower is negligible."""

    layers: int = 16
    hidden: int = 512
    intermediate: int = 1376
    heads: int = 8
    image_side: int = 24
    """Patches along one side of the image."""
    text_tokens: int = 64
    vocabulary: int = 1024
    vision_hidden: int = 64
    """Width of the vision tower; its heads are 64 wide."""
    vision_layers: int = 1
    vision_intermediate: int = 0
    """Width of the vision tower's MLP; 0 means twice the width of the tower."""
    vision_heads: int = 0
    """Heads of the vision tower; 0 means 64 wide."""
    kv_heads: int = 0
    """Heads of keys and values; 0 means `heads`."""
    family: Literal["llava", "qwen2_5_vl"] = "llava"
    batch: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    attention: str = "sdpa"
    """Attention implementation, by its name in transformers."""

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the image."""
        return self.image_side**2

    @property
    def words(self) -> int:
        """Number of token ids from which text is drawn, from the third on: without special ones."""
        return self.vocabulary - (3 if self.family == "qwen2_5_vl" else 0)


SHAPES = {
    "bench": SubjectShape(),
    "overlap": SubjectShape(text_tokens=1024, vision_hidden=512, vision_layers=12, vision_intermediate=2048),
    "llava-7b": SubjectShape(
        layers=32,
        hidden=4096,
        intermediate=11008,
        heads=32,
        vocabulary=32064,
        vision_hidden=1024,
        vision_layers=24,
        vision_intermediate=4096,
    ),
    "qwen2.5-vl-7b": SubjectShape(
        layers=28,
        hidden=3584,
        intermediate=18944,
        heads=28,
        kv_heads=4,
        vocabulary=152064,
        vision_hidden=1280,
        vision_layers=32,
        vision_intermediate=3420,
        vision_heads=16,
        family="qwen2_5_vl",
    ),
    "tiny-qwen": SubjectShape(
        layers=16,
        hidden=32,
        intermediate=64,
        heads=2,
        kv_heads=1,
        image_side=6,
        text_tokens=8,
        vocabulary=32,
        family="qwen2_5_vl",
    ),
    "tiny": SubjectShape(layers=16, hidden=32, intermediate=64, heads=2, image_side=6, text_tokens=8, vocabulary=32),
}
"""Shapes by name: the CPU benchmarks, one whose tower takes about as long as half the decoder, LLaVA-1.5-7B and
Qwen2.5-VL-7B with their towers, and tiny ones for smoke tests."""


def build_model(shape: SubjectShape) -> Any:
    """Return the model, with the same weights every time on the same kind of device.

    Raises `InputError` for a device that torch does not have, and for attention that transformers cannot run here.
    """
    check_device(shape.device)
    kind, config = qwen_model(shape, _IMAGE_TOKEN) if shape.family == "qwen2_5_vl" else _llava(shape)
    made = {"dtype": getattr(torch, shape.dtype), "attn_implementation": shape.attention}
    with torch.random.fork_rng(devices=[]), torch.device(shape.device):
        torch.manual_seed(0)
        try:
            return kind._from_config(config, **made).eval()
        except (ValueError, ImportError) as error:
            if shape.attention in ("sdpa", "eager"):
                raise
            what = shortened(str(error).split(". ")[0].replace("\n", " "))
            raise InputError(f"--attention {shape.attention}: {what}; use sdpa or eager") from error


def tower_of(model: Any, shape: SubjectShape) -> torch.nn.Module:
    """Return the vision tower of a model of this shape."""
    tower: torch.nn.Module = model.model.visual if shape.family == "qwen2_5_vl" else model.model.vision_tower
    return tower


def _llava(shape: SubjectShape) -> tuple[type[Any], LlavaConfig]:
    text = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        max_position_embeddings=4096,
    )
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_hidden,
        intermediate_size=shape.vision_intermediate or 2 * shape.vision_hidden,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads or shape.vision_hidden // 64,
        image_size=shape.image_side * 14,
        patch_size=14,
        projection_dim=64,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=_IMAGE_TOKEN,
        image_seq_length=shape.visual_tokens,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration, config


def twin(model: Any) -> Any:
    """Return a second model that shares the weights, so that a policy can be attached to only one of them."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def build_prompt(shape: SubjectShape) -> dict[str, Any]:
    """Return the inputs of one prefill; every sample is text, one image, text."""
    before = shape.text_tokens // 2
    generator = torch.Generator().manual_seed(0)
    tokens = shape.text_tokens + shape.visual_tokens
    ids = torch.randint(2, shape.words, (shape.batch, tokens), generator=generator)
    ids[:, before : before + shape.visual_tokens] = _IMAGE_TOKEN
    if shape.family == "qwen2_5_vl":
        pictures = qwen_pictures(shape, ids == _IMAGE_TOKEN, generator)
    else:
        side = shape.image_side * 14
        pixels = torch.randn((shape.batch, 3, side, side), generator=generator)
        pictures = {"pixel_values": pixels.to(getattr(torch, shape.dtype))}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures}
    return {name: value.to(shape.device) for name, value in inputs.items()}


def build_batch(shape: SubjectShape) -> dict[str, Any]:
    """Return the inputs of one training step: a prompt whose last quarter of text is labelled as the answer."""
    inputs = build_prompt(shape)
    labels = torch.full_like(inputs["input_ids"], -100)
    answer = max(1, shape.text_tokens // 4)
    labels[:, -answer:] = inputs["input_ids"][:, -answer:]
    return inputs | {"labels": labels}


def prefill_of(model: Any, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """Return a callable that runs one prefill as `generate` does: a fresh cache, logits of the last token only."""
    return lambda: getattr(model(**inputs, use_cache=True, logits_to_keep=1), CACHE_ARGUMENT)
