"""The first phase: the vision tower learns digits, colours and places from the patches themselves."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from dropflow_lab.digits.data.scenes import COLORS, PATCHES
from dropflow_lab.digits.training import optimizers, precision
from dropflow_lab.digits.training.loop import StepReport
from dropflow_lab.digits.training.packing import PackedBatch, draw_batch
from dropflow_lab.digits.training.recipe import Recipe


class DirectionHead(nn.Module):
    """A classifier on the direction of a feature only, with logits in -scale..scale.

    Since the logits are bounded, classes must take up a large share of the feature to be separated. A free linear head
    would settle for colours that make up one per cent of the feature's norm, which a language model can hardly read.
    """

    def __init__(self, width: int, classes: int, scale: float = 10.0) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.randn(classes, width))
        self.scale = scale

    def forward(self, features: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows classes"]:
        """Return the logits."""
        return (
            functional.linear(functional.normalize(features, dim=-1), functional.normalize(self.head, dim=-1))
            * self.scale
        )


class VisionHeads(nn.Module):
    """Training-time heads: digit, colour, row and column per patch; presence and number per picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.digit = DirectionHead(width, 11)
        self.color = DirectionHead(width, len(COLORS) + 1)
        self.place_head = nn.Linear(width, 6)
        self.presence_head = nn.Linear(width, 10)
        self.number_head = nn.Linear(width, 10)


class VisionPhase:
    """Trains the tower on layer -2 (what the language model will read) and on the class token."""

    name = "vision"

    def __init__(self, model: LlavaForConditionalGeneration, recipe: Recipe, seed: int) -> None:
        self.model, self.recipe, self.seed = model, recipe, seed
        self.steps, self.validate_every = recipe.vision_steps, recipe.vision_validate_every
        self.tower = model.model.vision_tower
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.heads = VisionHeads(model.config.vision_config.hidden_size)
        self.tower.requires_grad_(True)
        self.optimizers = optimizers.make_optimizers([self.tower, self.heads])

    def step(self, index: int) -> StepReport:
        """Take one step on scenes of 3-9 digits."""
        batch = draw_batch("train", (self.seed, 1, index), self.recipe.vision_batch, room=30, digits=(3, 9))
        rate = optimizers.learning_rate(index, self.steps, self.recipe.vision_rate)
        with precision.autocast():
            patches, summary = self._features(batch)
            loss = self._loss(batch, patches, summary)
        torch.autograd.backward(loss)
        optimizers.step(self.optimizers, rate)
        return StepReport(float(loss.detach()), rate)

    def _features(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        out = self.tower(batch.pixels, output_hidden_states=True)
        return out.hidden_states[-2][:, 1:], out.pooler_output

    def _loss(self, batch: PackedBatch, patches: Tensor, summary: Tensor) -> Tensor:
        digit, color = patch_labels(batch)
        patches, summary = patches.float(), summary.float()
        # Two thirds of the patches are background, so they get a low weight.
        weight = torch.where(batch.owner >= 0, 1.0, 0.15).reshape(-1)
        loss = _weighted(self.heads.digit(patches), digit, weight)
        loss = loss + _weighted(self.heads.color(patches), color, weight)
        places = torch.arange(PATCHES)
        row, column = places // 12 // 4, places % 12 // 4
        logits = self.heads.place_head(patches).flatten(0, 1)
        rows = len(batch.owner)
        loss = loss + 0.3 * functional.cross_entropy(logits[:, :3], row.repeat(rows))
        loss = loss + 0.3 * functional.cross_entropy(logits[:, 3:], column.repeat(rows))
        present = functional.one_hot(batch.digit.clamp(min=0), 10) * (batch.digit >= 0)[..., None]
        found = present.amax(1).float()
        loss = loss + functional.binary_cross_entropy_with_logits(self.heads.presence_head(summary), found)
        number = (batch.digit >= 0).sum(1)
        return loss + 0.3 * functional.cross_entropy(self.heads.number_head(summary), number)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the share of validation digits whose class (`accuracy`) and whose colour are predicted correctly.

        The patches of a digit vote with their log-probabilities.
        """
        right = total = colors = 0
        for chunk in range(self.recipe.vision_validation // 64):
            batch = draw_batch("validation", (0, 1, chunk), 64, room=30)
            with precision.autocast():
                patches, _ = self._features(batch)
            member = (batch.owner[:, None] == torch.arange(9)[:, None]).float()  # (batch, items, patches)
            known = batch.digit >= 0
            votes = member @ self.heads.digit(patches.float())[..., 1:].log_softmax(-1)
            right += int((votes.argmax(-1) == batch.digit)[known].sum())
            votes = member @ self.heads.color(patches.float())[..., 1:].log_softmax(-1)
            colors += int((votes.argmax(-1) == batch.color)[known].sum())
            total += int(known.sum())
        return {"accuracy": right / total, "color_accuracy": colors / total}

    def state_dict(self) -> dict[str, Any]:
        """Return model, heads and optimisers."""
        return {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def patch_labels(batch: PackedBatch) -> tuple[Int[Tensor, " patches"], Int[Tensor, " patches"]]:
    """Return digit and colour labels of all patches, flattened: 0 for background, else one more than the class."""
    owner = batch.owner.clamp(min=0)
    background = batch.owner < 0
    digit = (batch.digit.gather(1, owner) + 1).masked_fill(background, 0)
    color = (batch.color.gather(1, owner) + 1).masked_fill(background, 0)
    return digit.reshape(-1), color.reshape(-1)


def _weighted(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    losses = functional.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
    return (losses * weight).sum() / weight.sum()
