"""Training of the demo model, from scratch to a checkpoint folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import LlavaForConditionalGeneration

from dropflow_lab.digits.checkpoints.model import build_model, build_processor, export, load
from dropflow_lab.digits.training.attention import use_fast_attention
from dropflow_lab.digits.training.journal import Journal
from dropflow_lab.digits.training.loop import Clock, Phase, run_phase
from dropflow_lab.digits.training.recipe import SMOKE, Recipe
from dropflow_lab.digits.training.train_language import LanguagePhase
from dropflow_lab.digits.training.train_vision import VisionPhase
from dropflow_lab.files import write_text


def train(
    out: Path,
    *,
    seed: int = 0,
    threads: int = 1,
    smoke: bool = False,
    resume: bool = False,
    recipe: Recipe | None = None,
    save_seconds: float = 60.0,
    test: Callable[[Any, Any], str] | None = None,
) -> Path:
    """Train the model and write the checkpoint to `out`, which is returned.

    `out/run` holds the run's log and its state, which is saved every `save_seconds`; with `resume`, a killed run
    continues from there and ends with the same weights as an uninterrupted one. `smoke` replaces the recipe by a few
    seconds of every stage. Weights are selected on the validation split. `test` is called once with the finished model
    and its processor, and the JSON it returns is written to `out/test.json`. Results are reproducible only with the
    same `threads`, torch version and kind of processor. Raises `FileExistsError` if `out` holds a run and `resume` is
    not set, `ValueError` if that run has other settings.
    """
    chosen = recipe or (SMOKE if smoke else Recipe())
    journal = Journal(out / "run", {"seed": seed, **asdict(chosen)})
    if journal.state_path.exists() and not resume:
        raise FileExistsError(f"{out}: holds a training run already; resume it, or train into another folder")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _train(out, journal, seed, chosen, save_seconds, test)
    finally:
        torch.set_num_threads(before)


def _train(
    out: Path, journal: Journal, seed: int, recipe: Recipe, save_seconds: float, test: Callable[[Any, Any], str] | None
) -> Path:
    console = Console()
    state = journal.restore()
    clock = Clock(before=state["elapsed"] if state else 0.0)
    model = build_model(seed, recipe.decoder_layers)
    with use_fast_attention(model):
        if recipe.tower:
            _take_tower(model, recipe.tower)
        reached = state["phase"] if state else LanguagePhase.name if recipe.tower else VisionPhase.name
        if reached == VisionPhase.name:
            _run(VisionPhase(model, recipe, seed), state, journal, clock, save_seconds)
            state = None
        language = LanguagePhase(model, recipe, seed)
        _run(language, state, journal, clock, save_seconds)
        model.load_state_dict(language.best["model"])
    export(model, out)
    write_text(out / "training-log.jsonl", journal.log_path.read_text(encoding="utf-8"))
    console.print(f"kept step {language.best['step']}: validation {language.best['accuracy']:.1%}")
    if test is not None:
        shipped, _ = load(out)
        write_text(out / "test.json", test(shipped, build_processor()) + "\n")
    return out


def _take_tower(model: LlavaForConditionalGeneration, name: str) -> None:
    """Give the model the vision tower of a shipped checkpoint."""
    shipped, _ = load(name)
    model.model.vision_tower.load_state_dict(shipped.model.vision_tower.state_dict())


def _run(phase: Phase, state: dict[str, Any] | None, journal: Journal, clock: Clock, save_seconds: float) -> None:
    first = 0
    if state is not None:
        phase.load_state_dict(state["training"])
        first = int(state["step"])
    run_phase(phase, first, journal, clock, save_seconds)
