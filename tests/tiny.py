"""Tiny random LLaVAs and prompts for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.generation import utils as generation_utils

IMAGE, PAD, BOS, EOS = 98, 0, 1, 2
"""Token ids of the tiny vocabulary; 3..97 are words."""
TEXTS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def tiny_llava(
    *,
    text: str = "llama",
    tower: str = "clip",
    attention: str = "sdpa",
    layers: int = 6,
    tower_layers: int = 4,
    kv_heads: int = 2,
    grid: int = 4,
    width: int = 32,
    vocabulary: int = 99,
    seed: int = 0,
    **text_options: Any,
) -> Any:
    """A LLaVA with a grid x grid of patches, weights large enough for attention to be uneven."""
    torch.manual_seed(seed)
    language = TEXTS[text](
        hidden_size=width,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        **text_options,
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": tower_layers, "num_attention_heads": 2}
    image = {"image_size": 6 * grid, "patch_size": 6}
    clip = tower == "clip"
    vision = CLIPVisionConfig(**sizes, **image) if clip else SiglipVisionConfig(**sizes, **image, vision_use_head=False)
    config = LlavaConfig(
        text_config=language,
        vision_config=vision,
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if clip else "full",
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3 if "embed" in name else 1.2 * weight.shape[-1] ** -0.5)
    model.generation_config.suppress_tokens = [IMAGE]  # a random model would write placeholders of its own
    return model


Parts = Sequence[int | str]
"""A sample: runs of that many text tokens, and "I" for an image."""
MIXED: Sequence[Parts] = ((3, "I", 5), ("I", 2, "I", 9), (4,))
"""Ragged lengths, one image, two images, and a sample without any."""


def prompt(samples: Sequence[Parts] = MIXED, *, side: str = "left", grid: int = 4, seed: int = 1) -> dict[str, Any]:
    """Inputs of a padded batch."""
    dice = torch.Generator().manual_seed(seed)
    rows = [[BOS] for _ in samples]
    for row, parts in zip(rows, samples, strict=True):
        for part in parts:
            words = part if isinstance(part, int) else 0
            row += torch.randint(3, 97, (words,), generator=dice).tolist() if words else [IMAGE] * grid**2
    longest = max(map(len, rows))
    pads = [[PAD] * (longest - len(row)) for row in rows]
    ids = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [[0] * len(p) + o if side == "left" else o + [0] * len(p) for o, p in zip(ones, pads, strict=True)]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    images = sum(part == "I" for parts in samples for part in parts)
    if images:
        inputs["pixel_values"] = torch.randn(images, 3, 6 * grid, 6 * grid, generator=dice)
    return inputs


def policy(**stages: dict[str, Any]) -> dict[str, Any]:
    """A policy of these stages."""
    return {"name": "test", "stages": stages}


HIDROP = policy(
    inject={"use": "hidrop/late-injection", "at": 1},
    pyramid={"use": "hidrop/concave-pyramid", "keep": {2: 7, 4: 2}},
    exit={"use": "hidrop/early-exit", "at": 5},
)
"""All three stages on six layers and 16 visual tokens."""
RAGGED = policy(pyramid={"use": "hidrop/concave-pyramid", "keep": {2: 0.4, 4: 2}})
"""Pruning alone: two images keep more than one, so that samples of a batch hold different numbers of tokens."""
KEEP_ALL = policy(pyramid={"use": "hidrop/concave-pyramid", "keep": {2: 16}})
"""Armed, but nothing is ever dropped."""


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return float((value - expected).abs().max() / expected.abs().max())


CHUNKS_IMAGES = hasattr(generation_utils, "_slice_mm_encoder_output")
"""Whether this transformers can prefill a prompt with images in chunks (5.20 cannot; the engine then refuses)."""
