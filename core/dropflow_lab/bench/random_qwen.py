"""The model for benchmarks of videos and of packed towers: Qwen2.5-VL with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

_IMAGE, _VIDEO, _START, _END, _WORDS = 1, 2, 3, 4, 5
"""Token ids; words come after the special ones."""
_PATCH, _MERGE = 14, 2
_FRAMES_PER_STEP = 2


@dataclass(frozen=True)
class QwenShape:
    """Sizes of the model and of its prompt; by default the vision tower is small, as that of `random_llava`."""

    layers: int = 16
    hidden: int = 512
    intermediate: int = 1376
    heads: int = 8
    text_tokens: int = 64
    """Text of the prompt; half of it follows the pictures."""
    vocabulary: int = 1024
    frames: int = 16
    """Frames of the video; two make a time step. 0: a picture instead."""
    side: int = 8
    """Tokens along one side of a time step or a picture; a token is made of 2 x 2 patches."""
    vision_hidden: int = 64
    vision_intermediate: int = 128
    vision_layers: int = 1
    full_attention: tuple[int, ...] = (0,)
    """Layers of the tower whose attention is not confined to windows of 4 x 4 tokens."""

    @property
    def steps(self) -> int:
        """Time steps of the video; 1 for a picture."""
        return max(1, self.frames // _FRAMES_PER_STEP)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the prompt."""
        return self.steps * self.side**2


def build_qwen(shape: QwenShape) -> Any:
    """Return the model in float32, with the same weights every time."""
    quarter = shape.hidden // shape.heads // 8
    text = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 8192,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [4 * quarter - 2 * (3 * quarter // 2), 3 * quarter // 2, 3 * quarter // 2],
        },
    }
    vision = {
        "hidden_size": shape.vision_hidden,
        "intermediate_size": shape.vision_intermediate,
        "out_hidden_size": shape.hidden,
        "depth": shape.vision_layers,
        "num_heads": max(1, shape.vision_hidden // 64),
        "fullatt_block_indexes": list(shape.full_attention),
    }
    tokens = {
        "image_token_id": _IMAGE,
        "video_token_id": _VIDEO,
        "vision_start_token_id": _START,
        "vision_end_token_id": _END,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()


def build_video_prompt(shape: QwenShape) -> dict[str, Any]:
    """Return a prompt about a video of noise, a quarter of whose places change from one time step to the next."""
    generator = torch.Generator().manual_seed(0)
    width = 3 * _FRAMES_PER_STEP * _PATCH**2
    patches = torch.randn((shape.side**2, _MERGE**2, width), generator=generator)
    frames = [patches]
    for _ in range(shape.steps - 1):
        changed = torch.rand((shape.side**2, 1, 1), generator=generator) < 1 / 4
        frames.append(torch.where(changed, torch.randn(patches.shape, generator=generator), frames[-1]))
    pixels = torch.cat(frames).flatten(0, 1)
    return _prompt(shape, _VIDEO, generator) | {"pixel_values_videos": pixels, "video_grid_thw": _grid(shape)}


def build_page_prompt(shape: QwenShape, blank: float) -> dict[str, Any]:
    """Return a prompt about a page: columns of noise, and to their right the share `blank` of all columns in white."""
    generator = torch.Generator().manual_seed(0)
    width = 3 * _FRAMES_PER_STEP * _PATCH**2
    pixels = torch.randn((shape.side, shape.side, _MERGE**2, width), generator=generator)
    pixels[:, shape.side - round(blank * shape.side) :] = 1.0
    values = pixels.flatten(0, 2)
    return _prompt(shape, _IMAGE, generator) | {"pixel_values": values, "image_grid_thw": _grid(shape)}


def _grid(shape: QwenShape) -> torch.Tensor:
    return torch.tensor([[shape.steps, _MERGE * shape.side, _MERGE * shape.side]])


def _prompt(shape: QwenShape, placeholder: int, generator: torch.Generator) -> dict[str, Any]:
    words = torch.randint(_WORDS, shape.vocabulary, (shape.text_tokens,), generator=generator)
    half, visual = shape.text_tokens // 2, torch.full((shape.visual_tokens,), placeholder)
    ids = torch.cat((words[:half], torch.tensor([_START]), visual, torch.tensor([_END]), words[half:]))[None]
    types = (ids == _IMAGE).int() + 2 * (ids == _VIDEO).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
