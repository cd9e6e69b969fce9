"""Pictures and prompts for a model of any type in miniature, made from its config and without its processor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
import transformers
from torch import Tensor

from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing.families import minicpmv4_6
from dropflow.testing.families.qwen3_5 import ROUND_OFF
from dropflow.testing.families.tiny import END, IMAGE, START, Picture, Tiny, pixels
from dropflow_lab.backbones.miniature import class_name, miniature, small_config

Arguments = dict[str, Tensor]

IN_A_ROW = ("minicpm_ocr", "minicpmv4_7")
"""Types whose pictures lie in one row of pixels, with Qwen3.5's decoder."""


@cache
def model_of(kind: str) -> Any:
    """A model of a type, for its structure; nobody changes it."""
    return miniature(kind)


def tiny(kind: str) -> Tiny:
    """A type in miniature; `auto` states no grid for its images."""
    if kind in IN_A_ROW:
        finish = partial(_finished_in_a_row, kind)
        return Tiny(partial(_built, kind), {"image": partial(_in_a_row, kind)}, finish, **ROUND_OFF)
    return Tiny(
        partial(_built, kind),
        {"image": partial(_picture, kind)},
        partial(_finished, kind),
        tolerance=1e-4 if kind == "muse_spark" else 1e-5,  # alone and in a batch, it differs by 1.3e-5 without policy
    )


def _built(kind: str) -> Any:
    if kind in IN_A_ROW:  # the kit ranks at boundary 2, before the first attention of the default pattern
        config = small_config(kind)
        config.text_config.layer_types = ["linear_attention", "full_attention"] * 3
        return getattr(transformers, class_name(kind))(config)
    model = miniature(kind)
    if kind in ("apertus1p5", "fast_vlm"):  # their towers of convolutions have no attention to choose
        model.set_attn_implementation = lambda name: type(model).set_attn_implementation(model, {"text_config": name})
    return model


@torch.no_grad()
def _picture(kind: str, number: int, dice: torch.Generator) -> Picture:
    core = model_of(kind).base_model
    arguments = _ARGUMENTS.get(kind, _arguments)(kind, number, dice)
    entries = entries_of(core.get_image_features(**arguments, return_dict=True))
    layouts = [ImageLayout(len(rows)) for rows in entries]
    return Picture([START, *[IMAGE] * sum(map(len, entries)), END], arguments, layouts)


def _in_a_row(kind: str, number: int, dice: torch.Generator) -> Picture:
    """A picture of MiniCPM-V 4.6; MiniCPM-OCR joins 2 x 2 patches instead of 4 x 4."""
    picture = minicpmv4_6.packed_patches(number, dice)
    tokens = len(picture.arguments["pixel_values"]) // (4 if kind == "minicpm_ocr" else 16)
    return Picture([START, *[IMAGE] * tokens, END], picture.arguments, [ImageLayout(tokens)])


def _finished_in_a_row(kind: str, inputs: dict[str, Any]) -> dict[str, Any]:
    return _finished(kind, minicpmv4_6.along_the_width(inputs))


def entries_of(output: Any) -> list[Tensor]:
    """The features that a core returns, one tensor (rows, dim) per entry."""
    pooled = output.get("pooler_output")
    pooled = output["last_hidden_state"] if pooled is None else pooled
    entries = [pooled] if isinstance(pooled, Tensor) and pooled.dim() == 2 else list(pooled)
    return [rows.flatten(0, -2) for rows in entries]


def _arguments(kind: str, number: int, dice: torch.Generator) -> Arguments:
    """Arguments of one picture, by the names that the core's method takes."""
    core, config = model_of(kind).base_model, model_of(kind).config
    vision = next(getattr(config, name) for name in ("vision_config", "vq_config") if hasattr(config, name))
    names = inspect.signature(core.get_image_features).parameters
    if "image_grid_thw" in names:
        return _packed(kind, vision, number, dice)
    size = getattr(vision, "image_size", None) or 16
    size = size if isinstance(size, int) else size[0]
    if "image_sizes" in names:
        return {"pixel_values": pixels(dice, 1, 3, size, size), "image_sizes": torch.tensor([[size, size]])}
    return {"pixel_values": pixels(dice, 1, 3, size, size)}


def _packed(kind: str, vision: Any, number: int, dice: torch.Generator) -> Arguments:
    """A picture of 4 x 8 or 8 x 6 patches, packed into one sequence of patches."""
    rows, columns = ((4, 8), (8, 6))[number % 2]
    side, times = int(vision.patch_size), 1
    for name in ("temporal_patch_size", "patch_temporal"):
        times = int(getattr(vision, name, None) or times)
    patch = (3, side, side) if kind in ("kimi_k25", "paddleocr_vl") else (3 * times * side * side,)
    return {
        "pixel_values": pixels(dice, rows * columns, *patch),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }


def _with_merge_sizes(kind: str, number: int, dice: torch.Generator) -> Arguments:
    return _packed(kind, model_of(kind).config.vision_config, number, dice) | {"image_merge_sizes": torch.tensor([2])}


def _patches(_: str, __: int, dice: torch.Generator) -> Arguments:
    """Fuyu: 9 patches of 4 x 4 pixels."""
    return {"pixel_values": pixels(dice, 1, 9, 3 * 4 * 4)}


def _in_two_sizes(_: str, __: int, dice: torch.Generator) -> Arguments:
    return {"pixel_values": pixels(dice, 1, 3, 24, 24), "high_res_pixel_values": pixels(dice, 1, 3, 24, 24)}


def _placed_patches(kind: str, number: int, dice: torch.Generator) -> Arguments:
    """Gemma 4: 4 x 6 or 6 x 4 patches with their places."""
    rows, columns = ((4, 6), (6, 4))[number % 2]
    vision = model_of(kind).config.vision_config
    width = 3 * int(vision.patch_size) ** 2 * (1 if kind != "gemma4_unified" else int(vision.pooling_kernel_size) ** 2)
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
    return {"pixel_values": torch.rand(1, rows * columns, width, generator=dice), "image_position_ids": places[None]}


def _shaped_patches(_: str, number: int, dice: torch.Generator) -> Arguments:
    """LFM2-VL: 4 x 6 or 4 x 4 patches of 24 slots."""
    rows, columns = ((4, 6), (4, 4))[number % 2]
    used = torch.arange(24)[None] < rows * columns
    return {
        "pixel_values": pixels(dice, 1, 24, 3 * 4 * 4) * used[..., None],
        "spatial_shapes": torch.tensor([[rows, columns]]),
        "pixel_attention_mask": used.long(),
    }


def _packed_without_time(_: str, number: int, dice: torch.Generator) -> Arguments:
    """Nemotron-H Omni: 4 x 8 or 8 x 6 patches of 4 x 4 pixels."""
    rows, columns = ((4, 8), (8, 6))[number % 2]
    return {
        "pixel_values": pixels(dice, rows * columns, 3 * 4 * 4),
        "image_grid_hw": torch.tensor([[rows, columns]]),
    }


def _finished(kind: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Adds what the processor would say of every token, where the model asks for it."""
    names = inspect.signature(model_of(kind).forward).parameters
    types = {name: (inputs["input_ids"] == IMAGE).int() for name in ("mm_token_type_ids", "token_type_ids")}
    return inputs | {name: value for name, value in types.items() if name in names}


_ARGUMENTS: Mapping[str, Callable[[str, int, torch.Generator], Arguments]] = {
    "deepseek_vl_hybrid": _in_two_sizes,
    "fuyu": _patches,
    "gemma4": _placed_patches,
    "gemma4_unified": _placed_patches,
    "diffusion_gemma": _placed_patches,
    "lfm2_vl": _shaped_patches,
    "nemotron_h_omni": _packed_without_time,
    "video_llama_3": _with_merge_sizes,
}
"""Types that take other arguments."""
