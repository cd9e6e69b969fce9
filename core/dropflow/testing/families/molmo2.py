"""Molmo 2 in miniature."""

from __future__ import annotations

from typing import Any

import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families.tiny import END, IMAGE, START, TEXT, VISION, Picture, Tiny, pixels

PATCHES = 36
"""Patches of a crop of 24 x 24 pixels."""


def tiny() -> Tiny:
    """A Molmo 2 whose pictures have an overview of 3 x 3 tokens and one crop, and whose videos have two frames."""
    from transformers import Molmo2Config, Molmo2ForConditionalGeneration

    adapter = {**VISION, "head_dim": 8, "num_key_value_heads": 2, "vision_feature_layer": [-1, -2]}
    adapter |= {"text_hidden_size": TEXT["hidden_size"]}

    def build() -> Any:
        config = Molmo2Config(
            text_config={**TEXT, "head_dim": 8, "additional_vocab_size": 0},
            vision_config={**VISION, "head_dim": 8, "num_key_value_heads": 2, "image_size": [24, 24], "patch_size": 4},
            adapter_config=adapter,
            image_patch_id=IMAGE,
        )
        return Molmo2ForConditionalGeneration(config)

    return Tiny(build, {"image": picture, "video": video}, placed, mixes=False)


def picture(number: int, dice: torch.Generator) -> Picture:
    """An overview of 3 x 3 tokens, and a crop of which 3 x 3 or 2 x 3 tokens are not padding."""
    rows = 3 - number % 2
    arguments = {
        "pixel_values": pixels(dice, 2, PATCHES, 3 * 4 * 4),
        "image_token_pooling": torch.cat((pools(3), pools(rows) + PATCHES)),
        "image_grids": torch.tensor([[3, 3, rows, 3]]),
        "image_num_crops": torch.tensor([2]),
    }
    ids = [START, *[IMAGE] * 9, END, START, *([IMAGE] * 3 + [5]) * rows, END]
    return Picture(ids, arguments, [ImageLayout(9, (3, 3)), ImageLayout(3 * rows, (rows, 3))])


def video(_: int, dice: torch.Generator) -> Picture:
    """Two frames of 3 x 3 tokens, each after a text token."""
    arguments = {
        "pixel_values_videos": pixels(dice, 2, PATCHES, 3 * 4 * 4),
        "video_token_pooling": torch.cat((pools(3), pools(3) + PATCHES)),
        "video_grids": torch.tensor([[2, 3, 3]]),
    }
    return Picture([5, START, *[IMAGE] * 9, END] * 2, arguments, [ImageLayout(9, (3, 3))] * 2)


def pools(rows: int) -> torch.Tensor:
    """The four patches (tokens, 4) of each of rows x 3 tokens of a crop of 6 x 6 patches."""
    first = torch.cartesian_prod(torch.arange(rows) * 12, torch.arange(3) * 2).sum(1)
    return first[:, None] + torch.tensor([0, 1, 6, 7])


def placed(inputs: dict[str, Any]) -> dict[str, Any]:
    """Token types, and pools that count patches over all pictures of the batch."""
    inputs = inputs | {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).long()}
    for name, grids in (("image_token_pooling", "image_grids"), ("video_token_pooling", "video_grids")):
        if name in inputs:
            sizes = [h * w + r * c for h, w, r, c in inputs[grids].tolist()] if grids == "image_grids" else None
            sizes = sizes or [int(n) for n in inputs[grids].prod(1)]
            parts = inputs[name].split(sizes)
            inputs[name] = torch.cat([part + 2 * PATCHES * number for number, part in enumerate(parts)])
    return inputs
