"""The checkpoints that are stored as changes of low rank to `dense`: `clips` and `conversations`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dropflow_lab.digits.checkpoints import model as checkpoints
from dropflow_lab.digits.checkpoints.low_rank import apply_change
from dropflow_lab.digits.data.clip_questions import CLIP_WORDS
from dropflow_lab.digits.data.clips import SIDE
from dropflow_lab.digits.data.questions import VOCABULARY
from dropflow_lab.digits.data.scenes import CANVAS, PATCH

CLIPS, CONVERSATIONS = "clips", "conversations"
"""Names of the checkpoints."""
TEMPLATE = checkpoints.CHAT_TEMPLATE.replace(
    "{% for part in message['content'] %}", "{% set number = namespace(frame=0) %}{% for part in message['content'] %}"
).replace("{{ ' <image>' }}", "{% set number.frame = number.frame + 1 %}{{ ' frame ' ~ number.frame ~ ' <image>' }}")
"""Numbers the frames of a clip, as the templates of models for videos do."""


def start_clips() -> LlavaForConditionalGeneration:
    """Return `dense` in float32 for frames of 48 x 48 pixels, with the words of clips, those that it lacks at random.

    Of the tower's positions, the upper left 6 x 6 stay.
    """
    dense, _ = checkpoints.load("dense")
    model = checkpoints.build_model(words=CLIP_WORDS, side=SIDE)
    weights = dense.state_dict()
    for name, own in model.state_dict().items():
        if name.endswith("position_embedding.weight"):
            weights[name] = _upper_left(weights[name])
        elif own.shape[0] == len(CLIP_WORDS):
            weights[name] = torch.cat([weights[name], own[len(VOCABULARY) :]])
        elif name.endswith("position_ids"):
            weights[name] = own
    model.load_state_dict(weights)
    return model.eval()


def _upper_left(places: Tensor) -> Tensor:
    side, wide = SIDE // PATCH, CANVAS // PATCH
    grid = places[1:].view(wide, wide, -1)[:side, :side]
    return torch.cat([places[:1], grid.flatten(0, 1)])


def build_clip_processor() -> LlavaProcessor:
    """Return the processor for clips; it takes frames as pictures, and numbers them in the prompt."""
    return checkpoints.build_processor(words=CLIP_WORDS, side=SIDE, template=TEMPLATE)


def load_clips(path: Path | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return the model for clips in float32, and its processor.

    `path` is a file of changes, by default the shipped one.
    """
    model = start_clips()
    apply_change(model, path or shipped_change(CLIPS))
    return model, build_clip_processor()


def start_conversations() -> LlavaForConditionalGeneration:
    """Return `dense` in float32."""
    model, _ = checkpoints.load("dense")
    return model


def load_conversations(path: Path | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return the model for conversations in float32, and the processor of `dense`.

    `path` is a file of changes, by default the shipped one.
    """
    model = start_conversations()
    apply_change(model, path or shipped_change(CONVERSATIONS))
    return model, checkpoints.build_processor()


CHANGES: Mapping[str, Callable[[], tuple[LlavaForConditionalGeneration, LlavaProcessor]]] = {
    CLIPS: load_clips,
    CONVERSATIONS: load_conversations,
}
"""Loads each of the checkpoints that are stored as changes."""


def shipped_change(name: str) -> Path:
    """Return the shipped file of changes of `CLIPS` or `CONVERSATIONS`."""
    return Path(__file__).with_name(name) / "change.safetensors"
