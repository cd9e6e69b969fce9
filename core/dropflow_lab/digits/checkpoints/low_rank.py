"""Changes of low rank to the matrices of a checkpoint, which are stored instead of a whole one.

A change is two factors for each matrix of the projector and the language model, and all word embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import LlavaForConditionalGeneration

from dropflow_lab.files import replacing

WORDS = "words"
"""Key of the word embeddings in the file of changes."""


class LowRank(nn.Module):
    """A matrix plus the product of two factors; at first their product is zero."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        down = torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        self.up, self.down = nn.Parameter(torch.zeros(weight.shape[0], rank)), nn.Parameter(down)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed matrix."""
        return weight + self.up @ self.down


def matrices(model: LlavaForConditionalGeneration) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that change, by name."""
    for part in ("multi_modal_projector", "language_model"):
        for name, module in model.model.get_submodule(part).named_modules():
            if isinstance(module, nn.Linear):
                yield f"{part}.{name}", module


def make_low_rank(model: LlavaForConditionalGeneration, rank: int, seed: int) -> dict[str, LowRank]:
    """Freeze the model, but for its word embeddings and new factors for every one of `matrices`; return the factors."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    made = {}
    for name, module in list(matrices(model)):
        made[name] = LowRank(module.weight, rank, generator)
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


def apply_change(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Change a model in float32, in place, by the file of changes `path`."""
    change = {name: value.float() for name, value in load_file(path).items()}
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(change[WORDS])
        for name, module in matrices(model):
            module.weight += change[f"{name}.up"] @ change[f"{name}.down"]
