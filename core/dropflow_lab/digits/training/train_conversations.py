"""Training of the checkpoint for conversations: a change of low rank to `dense`, on several questions in a row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from dropflow_lab.digits.checkpoints.changes import load_conversations, start_conversations
from dropflow_lab.digits.training import precision
from dropflow_lab.digits.training.packed_conversations import (
    TURNS,
    conversation_losses,
    draw_conversations,
    validation_conversations,
)
from dropflow_lab.digits.training.train_change import Change, ChangePhase, ChangeRecipe

RECIPE = ChangeRecipe(rank=4, steps=300, schedule=300, batch=8, rate=3e-3, hold=0.4, validate_every=100, validation=200)
"""The recipe of the shipped checkpoint: eight pictures a step, each with about four conversations."""


class ConversationPhase(ChangePhase):
    """Trains on all visual tokens, and on the answers of all turns."""

    name = "conversations"

    def losses(self, index: int) -> Tensor:
        """Return the loss of every answer token of step `index`."""
        batch = draw_conversations("train", (self.seed, 5, index), self.recipe.batch)
        return conversation_losses(self.model, batch)[0]

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the share of validation questions answered correctly, overall and per turn, from 1."""
        right: dict[int, list[bool]] = {turn: [] for turn in range(TURNS[1])}
        for batch in validation_conversations(self.recipe.validation):
            with precision.autocast(), parametrize.cached():
                correct = conversation_losses(self.model, batch)[1]
            for turn, hits in right.items():
                hits += correct[batch.turn == turn].tolist()
        shares = {f"accuracy_turn_{turn + 1}": sum(hits) / len(hits) for turn, hits in right.items() if hits}
        return {"accuracy": sum(map(sum, right.values())) / sum(map(len, right.values())), **shares}


CHANGE = Change(RECIPE, ConversationPhase, start_conversations, load_conversations)
