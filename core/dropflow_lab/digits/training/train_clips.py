"""Training of the checkpoint for clips: a change of low rank to `dense`, on videos of digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import LlavaForConditionalGeneration

from dropflow_lab.digits.checkpoints import low_rank
from dropflow_lab.digits.data.clip_questions import CLIP_KINDS, clip_question_at
from dropflow_lab.digits.data.clips import FRAMES
from dropflow_lab.digits.training import optimizers, precision
from dropflow_lab.digits.training.attention import use_fast_attention
from dropflow_lab.digits.training.journal import Journal
from dropflow_lab.digits.training.loop import Clock, StepReport, run_phase
from dropflow_lab.digits.training.packed_clips import ClipBatch, draw_clips, pack_clips, prefix_ids
from dropflow_lab.digits.training.packing import IGNORED, mask_after
from dropflow_lab.files import write_text


@dataclass(frozen=True)
class ClipRecipe:
    """The numbers of a training run; the defaults are those of the shipped checkpoint."""

    steps: int = 290
    schedule: int = 340
    """Steps after which the rate would be 0; the last ones are not taken."""
    batch: int = 12
    """Clips per step, each with about 13 questions."""
    rate: float = 3e-3
    """Peak learning rate."""
    hold: float = 0.6
    """Share of the schedule after which the rate falls."""
    validate_every: int = 100
    validation: int = 270
    """Validation questions, one per clip, kinds in equal numbers."""


class ClipPhase:
    """Trains word embeddings and factors on all tokens of every frame; the last weights are the result."""

    name = "clips"

    def __init__(self, model: LlavaForConditionalGeneration, recipe: ClipRecipe, seed: int) -> None:
        self.model, self.recipe, self.seed = model, recipe, seed
        self.steps, self.validate_every = recipe.steps, recipe.validate_every
        trained = [one for one in model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, index: int) -> StepReport:
        """Take step `index`."""
        batch = draw_clips("train", (self.seed, 4, index), self.recipe.batch)
        rate = optimizers.learning_rate(index, self.recipe.schedule, self.recipe.rate, hold=self.recipe.hold)
        with precision.autocast(), parametrize.cached():
            loss = losses(self.model, batch)[0].mean()
        torch.autograd.backward(loss)
        optimizers.step([self.optimizer], rate)
        return StepReport(float(loss.detach()), rate)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the share of validation questions answered correctly, overall and per kind."""
        right: dict[str, list[bool]] = {kind: [] for kind in CLIP_KINDS}
        for first in range(0, self.recipe.validation, 45):
            asked = [clip_question_at("validation", first + row) for row in range(45)]
            batch = pack_clips([clip for clip, _ in asked], [[question] for _, question in asked])
            with precision.autocast(), parametrize.cached():
                correct = losses(self.model, batch)[1]
            for (_, question), hit in zip(asked, correct[:, 0].tolist(), strict=True):
                right[question.kind].append(hit)
        shares = {f"accuracy_{kind}": sum(hits) / len(hits) for kind, hits in right.items()}
        return {"accuracy": sum(map(sum, right.values())) / self.recipe.validation, **shares}

    def state_dict(self) -> dict[str, Any]:
        """Return model and optimiser."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


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


def train_clips(
    out: Path,
    *,
    seed: int = 0,
    threads: int = 1,
    resume: bool = False,
    recipe: ClipRecipe | None = None,
    save_seconds: float = 60.0,
    test: Callable[[Any, Any], str] | None = None,
) -> Path:
    """Train, and write `change.safetensors` and `training-log.jsonl` to `out`, which is returned.

    `out/run` holds log and state as in `train.train`, and the same errors are raised. `test` is called once with the
    finished model and its processor, and the JSON it returns is written to `out/test.json`.
    """
    chosen = recipe or ClipRecipe()
    journal = Journal(out / "run", {"seed": seed, **asdict(chosen)})
    if journal.state_path.exists() and not resume:
        raise FileExistsError(f"{out}: holds a training run already; resume it, or train into another folder")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _train(out, journal, seed, chosen, save_seconds)
    finally:
        torch.set_num_threads(before)
    if test is not None:
        write_text(out / "test.json", test(*low_rank.load_clips(out / "change.safetensors")) + "\n")
    return out


def _train(out: Path, journal: Journal, seed: int, recipe: ClipRecipe, save_seconds: float) -> None:
    state = journal.restore()
    model = low_rank.start()
    factors = low_rank.make_low_rank(model, seed)
    phase = ClipPhase(model, recipe, seed)
    if state is not None:
        phase.load_state_dict(state["training"])
    clock = Clock(before=state["elapsed"] if state else 0.0)
    with use_fast_attention(model):
        run_phase(phase, int(state["step"]) if state else 0, journal, clock, save_seconds)
    low_rank.save_change(low_rank.change_of(model, factors), out / "change.safetensors")
    write_text(out / "training-log.jsonl", journal.log_path.read_text(encoding="utf-8"))
