"""Gemma 4 in miniature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families.qwen2_vl import with_token_types
from dropflow.testing.families.tiny import END, IMAGE, START, TEXT, VIDEO, VISION, Picture, Tiny, pixels

POOL, PATCH, ROWS = 2, 4, 48
"""Patches of a token in either direction, pixels of a patch, and rows to which the processor pads every picture."""
TEXT_4: Mapping[str, Any] = {
    **TEXT,
    "num_hidden_layers": 8,
    "num_kv_shared_layers": 3,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full", *["sliding"] * 3, "full", "full")],
    "sliding_window": 11,
    "head_dim": 8,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": TEXT["vocab_size"],
}
"""Eight layers, of which the last three share keys."""


def tiny() -> Tiny:
    """A Gemma 4 with three layers that share keys, sliding windows shorter than the prompt, and two sizes of heads."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    def build() -> Any:
        vision = {
            **VISION,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": PATCH,
            "pooling_kernel_size": POOL,
            "position_embedding_size": 32,
        }
        config = Gemma4Config(
            text_config=dict(TEXT_4),
            vision_config=vision,
            audio_config=None,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=96,
            tie_word_embeddings=False,
        )
        return Gemma4ForConditionalGeneration(config)

    # attention scores are not divided by the root of the head size, so that round-off is larger than elsewhere
    return Tiny(build, {"image": padded_image, "video": padded_frames}, with_token_types, tolerance=3e-5)


def padded_image(number: int, dice: torch.Generator, pool: int = POOL, patch: int = PATCH) -> Picture:
    """A picture of 2 x 4 or 4 x 3 tokens of `pool` x `pool` patches, which are padded to `ROWS`."""
    grid = ((2, 4), (4, 3))[number % 2]
    values, places = _patches(grid, dice, pool, patch)
    tokens = grid[0] * grid[1]
    arguments = {"pixel_values": values, "image_position_ids": places}
    return Picture([START, *[IMAGE] * tokens, END], arguments, [ImageLayout(tokens, grid)])


def padded_frames(_: int, dice: torch.Generator, pool: int = POOL, patch: int = PATCH) -> Picture:
    """A video of two frames of 2 x 3 tokens of `pool` x `pool` patches."""
    frames = [_patches((2, 3), dice, pool, patch) for _ in range(2)]
    arguments = {
        "pixel_values_videos": torch.cat([values for values, _ in frames]),
        "video_position_ids": torch.cat([places for _, places in frames]),
        "num_frames_per_video": torch.tensor([2]),
    }
    return Picture([START, *[VIDEO] * 6, END, START, *[VIDEO] * 6, END], arguments, [ImageLayout(6, (2, 3))] * 2)


def _patches(grid: Sequence[int], dice: torch.Generator, pool: int, patch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (1, ROWS, 3 * patch * patch) and places (1, ROWS, 2), given as (x, y), with -1 for padding."""
    height, width = (pool * side for side in grid)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.full((ROWS, 2), -1)
    places[: height * width] = torch.stack((x.flatten(), y.flatten()), 1)
    values = torch.zeros(ROWS, 3 * patch**2)
    values[: height * width] = pixels(dice, height * width, 3 * patch**2)
    return values[None], places[None]
