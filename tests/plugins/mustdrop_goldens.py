"""What the published code computed, and the models it ran on, rebuilt from transformers' own classes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

DATA = Path(__file__).parents[1] / "data" / "mustdrop"
PLACEHOLDER = -200
"""What stands for an image in the recorded token ids."""


class Golden:
    """One recorded file; arrays come as tensors, scalars as Python numbers."""

    def __init__(self, name: str) -> None:
        with np.load(DATA / f"{name}.npz") as arrays:
            self._arrays = {key: arrays[key] for key in arrays.files}

    def __getitem__(self, key: str) -> Any:
        array = self._arrays[key]
        return array.item() if array.ndim == 0 else torch.from_numpy(array)

    def cases(self) -> list[str]:
        """First parts of all keys."""
        return sorted({key.split("/")[0] for key in self._arrays if "/" in key})

    def keys(self) -> list[str]:
        """All keys."""
        return list(self._arrays)


@functools.cache
def golden(name: str) -> Golden:
    """A recorded file by name."""
    return Golden(name)


def recorded_names(pattern: str) -> list[str]:
    """Names of the recorded files that match."""
    return sorted(path.stem for path in DATA.glob(pattern))


def _weights(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(DATA / name, "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@functools.cache
def recorded_llava(image_token: int) -> Any:
    """The recorded CLIP tower, projector and 32-layer Llama as one LLaVA; `image_token` must be no word of a prompt."""
    vision, tower = _weights("tiny_clip_weights.safetensors")
    text, llama = _weights("tiny_llava_llm_weights.safetensors")
    text = {key: value for key, value in text.items() if not key.startswith("mm_")}
    config = LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**vision),
        image_token_id=image_token,
        vision_feature_layer=-2,
        projector_hidden_act="gelu",
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    state = {f"model.vision_tower.{key.removeprefix('vision_model.')}": value for key, value in tower.items()}
    projector = {"model.mm_projector.0": "linear_1", "model.mm_projector.2": "linear_2"}
    for key, value in llama.items():
        name = key if key.startswith("lm_head") else key.replace("model.", "model.language_model.", 1)
        for old, new in projector.items():
            if key.startswith(old):
                name = key.replace(old, f"model.multi_modal_projector.{new}")
        state[name] = value
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or [name for name in missing if not name.endswith("position_ids")]:
        raise ValueError(f"the recorded weights do not fit: missing {missing}, unexpected {unexpected}")
    return model
