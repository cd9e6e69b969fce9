"""The second phase: the language model learns to answer, with the vision tower frozen.

Three stages under one learning-rate schedule: 48 visual tokens (cheap, and the digits are easy to find), all
144, and a mix of 24-144 chosen in three ways; or all 144 in all three, if the recipe leaves no tokens out.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from dropflow_lab.digits.data.dataset import question_at
from dropflow_lab.digits.data.questions import KINDS
from dropflow_lab.digits.data.scenes import COLORS
from dropflow_lab.digits.training import optimizers, precision
from dropflow_lab.digits.training.loop import StepReport
from dropflow_lab.digits.training.packing import (
    IGNORED,
    PREFIX,
    WORD_IDS,
    PackedBatch,
    answerable,
    draw_batch,
    pack,
    packed_mask,
    packed_positions,
)
from dropflow_lab.digits.training.recipe import Recipe
from dropflow_lab.digits.training.subsets import WAYS, draw_subset

_DIGIT_WORDS = tuple(WORD_IDS[str(digit)] for digit in range(10))
_COLOR_WORDS = tuple(WORD_IDS[color] for color in COLORS)
_SHORT = 48


class LanguagePhase:
    """Trains projector and language model; keeps the weights that do best on the validation split.

    Only weights of the last stage are candidates, as the others have not seen missing tokens.
    """

    name = "language"

    def __init__(self, model: LlavaForConditionalGeneration, recipe: Recipe, seed: int) -> None:
        self.model, self.recipe, self.seed = model, recipe, seed
        self.steps, self.validate_every = recipe.language_steps, recipe.language_validate_every
        model.model.vision_tower.requires_grad_(False)
        self.trained = [model.model.multi_modal_projector, model.model.language_model]
        self.optimizers = optimizers.make_optimizers(self.trained)
        self.done = 0
        self.best: dict[str, Any] = {"accuracy": -1.0, "step": 0, "model": {}}

    def step(self, index: int) -> StepReport:
        """Take one step of the stage that `index` belongs to."""
        batch = draw_batch("train", (self.seed, 2, index), self.recipe.language_batch, self.recipe.room)
        kept, compact, alignment = self._plan(index, batch)
        rate = optimizers.learning_rate(index, self.steps, self.recipe.language_rate)
        with precision.autocast():
            visual = self._visual(batch, kept)
            loss = packed_losses(self.model, batch, visual, kept, compact=compact)[0].mean()
            if alignment:
                loss = loss + alignment * self._alignment(batch, kept, visual)
        torch.autograd.backward(loss)
        optimizers.step(self.optimizers, rate)
        self.done = index + 1
        return StepReport(float(loss.detach()), rate)

    def _plan(self, index: int, batch: PackedBatch) -> tuple[Tensor | None, bool, float]:
        """Return the kept patches (`None`: all), whether positions are compact, and the weight of alignment."""
        rng = np.random.default_rng([self.seed, 3, index])
        missing = self.recipe.missing_tokens
        if index < self.recipe.short_steps:
            return draw_subset(batch.owner, _SHORT, "digits-first", rng) if missing else None, False, 0.3
        if index < self.recipe.short_steps + self.recipe.full_steps:
            return None, False, 0.1
        if not missing or rng.random() < 0.4:
            return None, False, 0.0
        way = WAYS[int(rng.integers(len(WAYS)))]
        kept = draw_subset(batch.owner, 8 * int(rng.integers(3, 19)), way, rng)
        return kept, bool(rng.random() < 0.25), 0.0

    def _visual(self, batch: PackedBatch, kept: Tensor | None) -> Float[Tensor, "batch visual width"]:
        with torch.no_grad():
            out = self.model.model.vision_tower(batch.pixels, output_hidden_states=True)
            features = out.hidden_states[-2][:, 1:]
            if kept is not None:
                features = features.gather(1, kept[..., None].expand(-1, -1, features.shape[2]))
        return cast(Tensor, self.model.model.multi_modal_projector(features))

    def _alignment(self, batch: PackedBatch, kept: Tensor | None, visual: Tensor) -> Tensor:
        """Return the loss that aligns the token of a digit's patch with the words for its class and its colour."""
        owner = batch.owner if kept is None else batch.owner.gather(1, kept)
        on_digit = owner >= 0
        rows = functional.normalize(visual.float()[on_digit], dim=-1)
        words = functional.normalize(self.model.get_input_embeddings().weight, dim=-1)
        items = owner.clamp(min=0)
        digit = functional.linear(rows, words[list(_DIGIT_WORDS)]) * 10
        color = functional.linear(rows, words[list(_COLOR_WORDS)]) * 10
        return functional.cross_entropy(digit, batch.digit.gather(1, items)[on_digit]) + functional.cross_entropy(
            color, batch.color.gather(1, items)[on_digit]
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the share of validation questions answered correctly with all tokens, overall and per kind."""
        right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        for batch in validation_batches(self.recipe.language_validation):
            with precision.autocast():
                visual = self._visual(batch, None)
                correct = packed_losses(self.model, batch, visual)[1]
            for kind, hit in zip(batch.kind[:, 0].tolist(), correct[:, 0].tolist(), strict=True):
                right[KINDS[kind]].append(hit)
        shares = {f"accuracy_{kind}": sum(hits) / len(hits) for kind, hits in right.items() if hits}
        accuracy = sum(sum(hits) for hits in right.values()) / sum(len(hits) for hits in right.values())
        last_stage = self.done > self.recipe.short_steps + self.recipe.full_steps
        if last_stage and accuracy > self.best["accuracy"]:
            weights = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.best = {"accuracy": accuracy, "step": self.done, "model": weights}
        return {"accuracy": accuracy, **shares}

    def state_dict(self) -> dict[str, Any]:
        """Return model, optimisers and the best weights so far."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.best = state["best"]


@cache
def validation_batches(count: int) -> tuple[PackedBatch, ...]:
    """Return the `count` fixed validation questions, packed one per picture."""
    asked = [question_at("validation", index) for index in range(count)]
    return tuple(
        pack([scene for scene, _ in asked[i : i + 50]], [[question] for _, question in asked[i : i + 50]])
        for i in range(0, count, 50)
    )


def packed_losses(
    model: LlavaForConditionalGeneration,
    batch: PackedBatch,
    visual: Float[Tensor, "batch visual width"],
    kept: Int[Tensor, "batch visual"] | None = None,
    *,
    compact: bool = False,
) -> tuple[Float[Tensor, " answers"], Tensor]:
    """Return the loss of every answer token that can be known, and which questions are answered correctly.

    `kept` are the patches whose tokens `visual` holds; questions about digits without a kept patch are left out. The
    second value is `(batch, questions)`, True where the most likely token is right at every scored position.
    """
    embed = model.get_input_embeddings()
    prefix = embed(torch.tensor(PREFIX)).expand(len(visual), -1, -1).to(visual.dtype)
    rows = torch.cat([prefix, visual, embed(batch.tokens).to(visual.dtype)], dim=1)
    states = model.model.language_model(
        inputs_embeds=rows,
        attention_mask=packed_mask(batch.segment, visual.shape[1], visual.dtype),
        position_ids=packed_positions(batch, kept, compact=compact),
        use_cache=False,
        prefix_length=rows.shape[1] - batch.tokens.shape[1],
    ).last_hidden_state
    scored = batch.labels != IGNORED
    if kept is not None:
        known = answerable(batch, kept).gather(1, batch.segment.clamp(min=0))
        scored = scored & known
    logits = model.lm_head(states[:, len(PREFIX) + visual.shape[1] :][scored]).float()
    labels = batch.labels[scored]
    losses = functional.cross_entropy(logits, labels, reduction="none")
    wrong = torch.zeros(batch.kind.shape)
    row = torch.arange(len(visual))[:, None].expand_as(batch.segment)[scored]
    wrong.index_put_((row, batch.segment[scored]), (logits.argmax(-1) != labels).float(), accumulate=True)
    return losses, wrong == 0
