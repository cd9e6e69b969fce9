"""GLM-4.1V in miniature."""

from __future__ import annotations

from typing import Any

import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families.qwen2_vl import packed, packed_image, tokens_and_text
from dropflow.testing.families.tiny import END, IMAGE, START, Picture, Tiny


def tiny() -> Tiny:
    """A GLM-4.1V with images of 2 x 4 and 4 x 3 tokens and videos of two frame pairs."""
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    def build() -> Any:
        return Glm4vForConditionalGeneration(Glm4vConfig(**small()))

    return glm(build)


def glm(build: Any) -> Tiny:
    """A GLM, whose videos use the placeholder of images."""
    return Tiny(build, {"image": packed_image, "video": stamped_video}, with_token_types, mixes=False)


def small(**text: Any) -> dict[str, Any]:
    """Options of a tiny config."""
    vision = {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "depth": 2, "num_heads": 2}
    vision |= {"patch_size": 4, "image_size": 32}
    tokens = {"image_start_token_id": START, "image_end_token_id": END}
    return {**tokens_and_text([2, 1, 1], **text), "vision_config": vision, **tokens}


def stamped_video(_: int, dice: torch.Generator) -> Picture:
    """A video of two times 2 x 3 tokens, each after a text token."""
    frame = [5, START, *[IMAGE] * 6, END]
    return Picture(frame * 2, packed("video", 2, 4, 6, dice), [ImageLayout(6, (2, 3))] * 2)


def with_token_types(inputs: dict[str, Any]) -> dict[str, Any]:
    """Adds what multimodal RoPE reads: 0 for text, 1 for images, 2 for videos."""
    kind = 2 if "pixel_values_videos" in inputs else 1
    return inputs | {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).int() * kind}
