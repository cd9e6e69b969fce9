"""The subject of engine benchmarks as a Qwen2.5-VL: random weights in the sizes of a `SubjectShape`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dropflow_lab.bench.random_llava import SubjectShape

_PATCH, _MERGE, _WINDOW = 14, 2, 112
"""Pixels along a patch, patches along a token, pixels along a window of attention in the tower."""


def qwen_model(shape: SubjectShape, image_token: int) -> tuple[type[Any], Any]:
    """Return the class and the config of a model of this shape; the last three words of its vocabulary are special."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    half = shape.hidden // shape.heads // 2
    sections = [half // 4, (half - half // 4) // 2, half - half // 4 - (half - half // 4) // 2]
    text = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads or shape.heads,
        "bos_token_id": None,
        "eos_token_id": None,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6},
    }
    depth = shape.vision_layers
    vision = {
        "hidden_size": shape.vision_hidden,
        "out_hidden_size": shape.hidden,
        "intermediate_size": shape.vision_intermediate or 2 * shape.vision_hidden,
        "depth": depth,
        "num_heads": shape.vision_heads or shape.vision_hidden // 64,
        "patch_size": _PATCH,
        "spatial_merge_size": _MERGE,
        "window_size": _WINDOW,
        "fullatt_block_indexes": sorted({max(0, depth * quarter // 4 - 1) for quarter in (1, 2, 3, 4)}),
    }
    video, start, end = (shape.vocabulary - place for place in (1, 2, 3))
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image_token,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return Qwen2_5_VLForConditionalGeneration, config


def qwen_pictures(shape: SubjectShape, visual: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Return what the processor gives for one image of each sample; `visual` (batch, tokens) marks its tokens."""
    side = shape.image_side * _MERGE
    patches = torch.randn((shape.batch * side**2, 3 * 2 * _PATCH**2), generator=generator)
    return {
        "pixel_values": patches.to(getattr(torch, shape.dtype)),
        "image_grid_thw": torch.tensor([[1, side, side]] * shape.batch),
        "mm_token_type_ids": visual.int(),
    }
