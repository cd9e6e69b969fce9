"""Qwen2-VL in miniature."""

from __future__ import annotations

from typing import Any

import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families.tiny import END, IMAGE, START, TEXT, VIDEO, Picture, Tiny, pixels


def tiny() -> Tiny:
    """A Qwen2-VL with images of 2 x 4 and 4 x 3 tokens and videos of two frame pairs."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"embed_dim": 16, "hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}

    def build() -> Any:
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(**tokens_and_text([2, 1, 1]), vision_config=vision))

    return Tiny(build, {"image": packed_image, "video": packed_video}, with_token_types)


def tokens_and_text(sections: list[int], **more: Any) -> dict[str, Any]:
    """Options that the configs of the Qwen families share."""
    rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 10000.0}
    return {
        "text_config": {**TEXT, "rope_parameters": rope, **more},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }


def packed(name: str, times: int, height: int, width: int, dice: torch.Generator) -> dict[str, torch.Tensor]:
    """Arguments for times x height x width patches of 2 x 4 x 4 pixels, packed into one sequence."""
    grid = torch.tensor([[times, height, width]])
    values = pixels(dice, times * height * width, 3 * 2 * 4 * 4)
    return {"pixel_values" + ("_videos" if name == "video" else ""): values, f"{name}_grid_thw": grid}


def packed_image(number: int, dice: torch.Generator) -> Picture:
    """An image of 2 x 4 or 4 x 3 tokens."""
    rows, columns = ((2, 4), (4, 3))[number % 2]
    ids = [START, *[IMAGE] * (rows * columns), END]
    return Picture(ids, packed("image", 1, 2 * rows, 2 * columns, dice), [ImageLayout(rows * columns, (rows, columns))])


def packed_video(_: int, dice: torch.Generator) -> Picture:
    """A video of two times 2 x 3 tokens."""
    return Picture([START, *[VIDEO] * 12, END], packed("video", 2, 4, 6, dice), [ImageLayout(6, (2, 3))] * 2)


def with_token_types(inputs: dict[str, Any]) -> dict[str, Any]:
    """Adds `mm_token_type_ids`, which multimodal RoPE and some masks read: 0 for text, 1 for images, 2 for videos."""
    ids = inputs["input_ids"]
    return inputs | {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
