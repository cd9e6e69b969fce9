"""The checkpoint for clips: `dense` on small frames, with a few more words and changes of low rank to its matrices.

What is stored is the change alone, a tenth of a checkpoint: two factors for each matrix, and all word embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dropflow_lab.digits.checkpoints import model as checkpoints
from dropflow_lab.digits.data.clip_questions import CLIP_WORDS
from dropflow_lab.digits.data.clips import SIDE
from dropflow_lab.digits.data.questions import VOCABULARY
from dropflow_lab.digits.data.scenes import CANVAS, PATCH
from dropflow_lab.files import replacing

CLIPS = "clips"
"""Name of the checkpoint."""
RANK = 8
"""Of the change to each matrix of the projector and the language model."""
WORDS = "words"
"""Key of the word embeddings in the file of changes."""
TEMPLATE = checkpoints.CHAT_TEMPLATE.replace(
    "{% for part in message['content'] %}", "{% set number = namespace(frame=0) %}{% for part in message['content'] %}"
).replace("{{ ' <image>' }}", "{% set number.frame = number.frame + 1 %}{{ ' frame ' ~ number.frame ~ ' <image>' }}")
"""Numbers the frames, as the templates of models for videos do."""


def start() -> LlavaForConditionalGeneration:
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


class LowRank(nn.Module):
    """A matrix plus the product of two factors; at first their product is zero."""

    def __init__(self, weight: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        down = torch.randn(RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        self.up, self.down = nn.Parameter(torch.zeros(weight.shape[0], RANK)), nn.Parameter(down)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed matrix."""
        return weight + self.up @ self.down


def matrices(model: LlavaForConditionalGeneration) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that change, by name."""
    for part in ("multi_modal_projector", "language_model"):
        for name, module in model.model.get_submodule(part).named_modules():
            if isinstance(module, nn.Linear):
                yield f"{part}.{name}", module


def make_low_rank(model: LlavaForConditionalGeneration, seed: int) -> dict[str, LowRank]:
    """Freeze the model, but for its word embeddings and new factors for every one of `matrices`; return the factors."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    made = {}
    for name, module in list(matrices(model)):
        made[name] = LowRank(module.weight, generator)
        parametrize.register_parametrization(module, "weight", made[name])
    return made


def change_of(model: LlavaForConditionalGeneration, factors: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Return word embeddings and factors."""
    found = {WORDS: model.get_input_embeddings().weight.detach().clone()}
    for name, own in factors.items():
        found |= {f"{name}.up": own.up.detach().clone(), f"{name}.down": own.down.detach().clone()}
    return found


def save_change(change: dict[str, Tensor], path: Path) -> None:
    """Write a change in bfloat16, readable for everyone."""
    with replacing(path) as part:
        save_file({name: value.to(torch.bfloat16).contiguous() for name, value in change.items()}, part)
        part.chmod(0o644)


def load_clips(path: Path | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return the model for clips in float32, and its processor.

    `path` is a file of changes, by default the shipped one.
    """
    change = {name: value.float() for name, value in load_file(path or shipped_change()).items()}
    model = start()
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(change[WORDS])
        for name, module in matrices(model):
            module.weight += change[f"{name}.up"] @ change[f"{name}.down"]
    return model, build_processor()


def build_processor() -> LlavaProcessor:
    """Return the processor for clips; it takes frames as pictures, and numbers them in the prompt."""
    return checkpoints.build_processor(words=CLIP_WORDS, side=SIDE, template=TEMPLATE)


def shipped_change() -> Path:
    """Return the shipped file of changes."""
    return Path(__file__).with_name(CLIPS) / "change.safetensors"
