"""Tiny models of families that have no adapter: `auto` must serve them with no code of their own."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families.tiny import (
    END,
    IMAGE,
    START,
    TEXT,
    VIDEO,
    VISION,
    Picture,
    Tiny,
    pixels,
    square_pictures,
)

SIGLIP = {**VISION, "model_type": "siglip_vision_model", "image_size": 24, "patch_size": 6, "vision_use_head": False}


def aria() -> Any:
    text = {**TEXT, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    vision = {**VISION, "model_type": "idefics3_vision", "image_size": 24, "patch_size": 6}
    return transformers.AriaForConditionalGeneration(
        transformers.AriaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=IMAGE,
            projector_patch_to_query_dict={16: 9},
        )
    )


def cohere2_vision() -> Any:
    return transformers.Cohere2VisionForConditionalGeneration(
        transformers.Cohere2VisionConfig(
            text_config={**TEXT, "model_type": "cohere2", "sliding_window": 9},
            vision_config=SIGLIP | {"image_size": 36},
            image_token_id=IMAGE,
            alignment_intermediate_size=32,
        )
    )


def deepseek_vl() -> Any:
    return transformers.DeepseekVLForConditionalGeneration(
        transformers.DeepseekVLConfig(
            text_config={**TEXT, "model_type": "llama"}, vision_config=SIGLIP, image_token_id=IMAGE
        )
    )


def exaone4_5() -> Any:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "out_hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "num_key_value_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    return transformers.Exaone4_5_ForConditionalGeneration(
        transformers.Exaone4_5_Config(
            text_config={**TEXT, "model_type": "exaone4", "sliding_window": 9, "sliding_window_pattern": 2},
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        )
    )


def fuyu() -> Any:
    text = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    return transformers.FuyuForCausalLM(
        transformers.FuyuConfig(text_config={**text, "model_type": "persimmon"}, patch_size=4, image_token_id=IMAGE)
    )


def packed_image(number: int, dice: torch.Generator) -> Picture:
    rows, columns = ((2, 4), (4, 3))[number % 2]
    patches = 4 * rows * columns
    arguments = {
        "pixel_values": pixels(dice, patches, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
    }
    return Picture([START, *[IMAGE] * (rows * columns), END], arguments, [ImageLayout(rows * columns)])


def patches(_: int, dice: torch.Generator) -> Picture:
    return Picture([IMAGE] * 9, {"pixel_values": pixels(dice, 1, 9, 3 * 4 * 4)}, [ImageLayout(9)])


UNSEEN = {
    "aria": Tiny(aria, {"image": square_pictures(24, 9, gridded=False)}),
    "cohere2_vision": Tiny(cohere2_vision, {"image": square_pictures(36, 9, gridded=False)}),
    "deepseek_vl": Tiny(deepseek_vl, {"image": square_pictures(24, 16, gridded=False)}),
    "exaone4_5": Tiny(exaone4_5, {"image": packed_image}),
    "fuyu": Tiny(fuyu, {"image": patches}),
}
