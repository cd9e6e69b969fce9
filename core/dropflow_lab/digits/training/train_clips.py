"""Training of the checkpoint for clips: a change of low rank to `dense`, on videos of digits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import LlavaForConditionalGeneration

from dropflow_lab.digits.checkpoints.changes import load_clips, start_clips
from dropflow_lab.digits.data.clip_questions import CLIP_KINDS, clip_question_at
from dropflow_lab.digits.data.clips import FRAMES
from dropflow_lab.digits.training import precision
from dropflow_lab.digits.training.packed_clips import ClipBatch, draw_clips, pack_clips, prefix_ids
from dropflow_lab.digits.training.packing import IGNORED, mask_after
from dropflow_lab.digits.training.train_change import Change, ChangePhase, ChangeRecipe

RECIPE = ChangeRecipe(
    rank=8, steps=290, schedule=340, batch=12, rate=3e-3, hold=0.6, validate_every=100, validation=270
)
"""The recipe of the shipped checkpoint: twelve clips a step, each with about 13 questions; one question a clip in the
validation, kinds in equal numbers."""


class ClipPhase(ChangePhase):
    """Trains on all tokens of every frame."""

    name = "clips"

    def losses(self, index: int) -> Tensor:
        """Return the loss of every answer token of step `index`."""
        return losses(self.model, draw_clips("train", (self.seed, 4, index), self.recipe.batch))[0]

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the share of validation questions answered correctly, overall and per kind."""
        right: dict[str, list[bool]] = {kind: [] for kind in CLIP_KINDS}
        for first in range(0, self.recipe.validation, 45):
            rows = range(first, min(first + 45, self.recipe.validation))
            asked = [clip_question_at("validation", row) for row in rows]
            batch = pack_clips([clip for clip, _ in asked], [[question] for _, question in asked])
            with precision.autocast(), parametrize.cached():
                correct = losses(self.model, batch)[1]
            for (_, question), hit in zip(asked, correct[:, 0].tolist(), strict=True):
                right[question.kind].append(hit)
        shares = {f"accuracy_{kind}": sum(hits) / len(hits) for kind, hits in right.items() if hits}
        return {"accuracy": sum(map(sum, right.values())) / self.recipe.validation, **shares}


def losses(model: LlavaForConditionalGeneration, batch: ClipBatch) -> tuple[Tensor, Tensor]:
    """Return the loss of every answer token, `(answers,)`, and which questions are right, `(batch, questions)`."""
    embed, before, size = model.get_input_embeddings(), prefix_ids(), len(batch.tokens)
    with torch.no_grad():
        features = model.model.vision_tower(batch.pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    visual = model.model.multi_modal_projector(features)
    rows = embed(torch.cat([before.expand(size, -1), batch.tokens], 1)).to(visual.dtype)
    places = (before == model.config.image_token_id).nonzero()[:, 0]
    rows = rows.index_copy(1, places, visual.reshape(size, FRAMES * visual.shape[1], -1))
    states = model.model.language_model(
        inputs_embeds=rows,
        attention_mask=mask_after(batch.segment, len(before), rows.dtype),
        position_ids=torch.cat([torch.arange(len(before)).expand(size, -1), len(before) + batch.offset], 1),
        use_cache=False,
        prefix_length=len(before),
    ).last_hidden_state
    scored = batch.labels != IGNORED
    logits, labels = model.lm_head(states[:, len(before) :][scored]).float(), batch.labels[scored]
    wrong = torch.zeros(batch.kind.shape)
    row = torch.arange(size)[:, None].expand_as(batch.segment)[scored]
    wrong.index_put_((row, batch.segment[scored]), (logits.argmax(-1) != labels).float(), accumulate=True)
    return functional.cross_entropy(logits, labels, reduction="none"), wrong == 0


CHANGE = Change(RECIPE, ClipPhase, start_clips, load_clips)
