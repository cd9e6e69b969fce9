"""The training loop that all phases share: steps, validation, log, saved states and a progress bar."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dropflow_lab.digits.training.journal import Journal


@dataclass(frozen=True)
class StepReport:
    """Loss and learning rate of one optimiser step."""

    loss: float
    learning_rate: float


class Phase(Protocol):
    """A part of the training with its own number of steps."""

    name: str
    steps: int
    validate_every: int
    """Steps between two validations; the last step is always followed by one."""

    def step(self, index: int) -> StepReport:
        """Take step `index`, whose data depend on the seed and the index alone."""

    def validate(self) -> dict[str, float]:
        """Evaluate the current model on the validation split; the result must include `accuracy` (0..1)."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes from step to step."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


@dataclass
class Clock:
    """Seconds of training, over the first run and all resumed ones."""

    before: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        """Return the seconds so far, including those before the last resume."""
        return self.before + time.monotonic() - self.started


def run_phase(phase: Phase, first: int, journal: Journal, clock: Clock, save_seconds: float) -> None:
    """Take the steps `first` .. `phase.steps` - 1, saving the state about every `save_seconds`."""
    saved, loss = time.monotonic(), 0.0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  validation {task.fields[accuracy]:.1%}"),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task(phase.name, total=phase.steps, completed=first, loss=0.0, accuracy=0.0)
        for index in range(first, phase.steps):
            report = phase.step(index)
            done = index + 1
            # Averaged over about the last 20 steps, for the bar only.
            loss = report.loss if index == first else 0.95 * loss + 0.05 * report.loss
            progress.update(bar, completed=done, loss=loss)
            facts: dict[str, float] = {"loss": round(report.loss, 5)}
            if done % phase.validate_every == 0 or done == phase.steps:
                facts |= {name: round(value, 5) for name, value in phase.validate().items()}
                progress.update(bar, accuracy=facts["accuracy"])
            if done % 10 == 0 or done == phase.steps or "accuracy" in facts:
                journal.append(
                    phase=phase.name,
                    step=done,
                    learning_rate=round(report.learning_rate, 7),
                    seconds=round(clock.elapsed(), 1),
                    **facts,
                )
            if time.monotonic() - saved >= save_seconds or done == phase.steps:
                state = {"phase": phase.name, "step": done, "elapsed": clock.elapsed()}
                journal.save({**state, "training": phase.state_dict()})
                saved = time.monotonic()
