"""Training of a checkpoint that is stored as a change of low rank: word embeddings, and two factors for each matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from transformers import LlavaForConditionalGeneration

from dropflow_lab.digits.checkpoints import low_rank
from dropflow_lab.digits.training import optimizers, precision
from dropflow_lab.digits.training.attention import use_fast_attention
from dropflow_lab.digits.training.journal import Journal
from dropflow_lab.digits.training.loop import Clock, StepReport, run_phase
from dropflow_lab.files import write_text


@dataclass(frozen=True)
class ChangeRecipe:
    """The numbers of a training run."""

    rank: int
    """Of the change to each matrix of the projector and the language model."""
    steps: int
    schedule: int
    """Steps after which the rate would be 0; if more than `steps`, the last ones are not taken."""
    batch: int
    """Pictures or clips of a step, each with all that is asked about it."""
    rate: float
    """Peak learning rate."""
    hold: float
    """Share of the schedule after which the rate falls."""
    validate_every: int
    validation: int
    """Validation questions, or conversations."""


class ChangePhase(ABC):
    """Trains word embeddings and factors with AdamW; the last weights are the result."""

    name: str

    def __init__(self, model: LlavaForConditionalGeneration, recipe: ChangeRecipe, seed: int) -> None:
        self.model, self.recipe, self.seed = model, recipe, seed
        self.steps, self.validate_every = recipe.steps, recipe.validate_every
        trained = [one for one in model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)

    @abstractmethod
    def losses(self, index: int) -> Tensor:
        """Return the loss of every answer token of step `index`."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Return shares of validation questions answered correctly, `accuracy` among them."""

    def step(self, index: int) -> StepReport:
        """Take step `index`."""
        rate = optimizers.learning_rate(index, self.recipe.schedule, self.recipe.rate, hold=self.recipe.hold)
        with precision.autocast(), parametrize.cached():
            loss = self.losses(index).mean()
        torch.autograd.backward(loss)
        optimizers.step([self.optimizer], rate)
        return StepReport(float(loss.detach()), rate)

    def state_dict(self) -> dict[str, Any]:
        """Return model and optimiser."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass(frozen=True)
class Change:
    """A checkpoint that is trained so."""

    recipe: ChangeRecipe
    """That of the shipped one."""
    phase: type[ChangePhase]
    start: Callable[[], LlavaForConditionalGeneration]
    """Returns the model that is changed."""
    load: Callable[[Path], tuple[Any, Any]]
    """Returns the changed model and its processor, given what `train_change` has written."""


def train_change(
    out: Path,
    change: Change,
    *,
    seed: int = 0,
    threads: int = 1,
    resume: bool = False,
    recipe: ChangeRecipe | None = None,
    save_seconds: float = 60.0,
    test: Callable[[Any, Any], str] | None = None,
) -> Path:
    """Train a change, and write `change.safetensors` and `training-log.jsonl` to `out`, which is returned.

    `recipe` replaces that of the change. `test` is called once with the finished model and its processor, and the JSON
    it returns is written to `out/test.json`. `out/run` holds log and state as in `train.train`, and the same errors are
    raised.
    """
    recipe = change.recipe if recipe is None else recipe
    journal = Journal(out / "run", {"seed": seed, **asdict(recipe)})
    if journal.state_path.exists() and not resume:
        raise FileExistsError(f"{out}: holds a training run already; resume it, or train into another folder")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        state = journal.restore()
        model = change.start()
        factors = low_rank.make_low_rank(model, recipe.rank, seed)
        training = change.phase(model, recipe, seed)
        if state is not None:
            training.load_state_dict(state["training"])
        clock = Clock(before=state["elapsed"] if state else 0.0)
        with use_fast_attention(model):
            run_phase(training, int(state["step"]) if state else 0, journal, clock, save_seconds)
    finally:
        torch.set_num_threads(before)
    path = out / "change.safetensors"
    low_rank.save_change(low_rank.change_of(model, factors), path)
    write_text(out / "training-log.jsonl", journal.log_path.read_text(encoding="utf-8"))
    if test is not None:
        write_text(out / "test.json", test(*change.load(path)) + "\n")
    return out
