"""Profiles a model's layers: measures, sweeps, and the rule's choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dropflow.backbone.backbone import backbone_for
from dropflow.policy.policy import Policy, policy_from_dict
from dropflow_lab.inputs.data import Sample
from dropflow_lab.inputs.prompts import build_inputs
from dropflow_lab.profile.layers import LayerCurves, LayerMeter, other_pictures
from dropflow_lab.profile.rule import Choice, Knobs, choose
from dropflow_lab.profile.sweep import Quality, Tally, end_tokens, generate

SCHEMA = "dropflow-profile/1"
"""Version of `profile.json`."""


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    top: float = 0.1
    """K of ILVAS, as a share of a sample's visual tokens."""
    batch_size: int = 32
    max_new_tokens: int = 32


@dataclass(frozen=True)
class Profile:
    """Everything measured, and the choice based on it."""

    layers: int
    visual_tokens: int
    """Visual tokens of one image; the mean, rounded, where images differ."""
    images_differ: bool
    samples: int
    settings: Settings
    knobs: Knobs
    curves: LayerCurves
    dense: Quality
    exits: tuple[Quality, ...]
    """Quality without vision from boundary x on, for x = 0..L-1."""
    entries: tuple[Quality, ...]
    """Quality with the projector's output entering at boundary e, for e = 0..L-1."""
    choice: Choice

    def to_json(self) -> dict[str, Any]:
        """Return plain data, as written to `profile.json`."""
        return {"schema": SCHEMA, **asdict(self)}


def profile(model: Any, processor: Any, samples: Sequence[Sample], settings: Settings, knobs: Knobs) -> Profile:
    """Measure every layer of `model` on `samples`, sweep exit and entry, and choose boundaries by the rule.

    All runs go through the engine: the model's own attention, and no full attention map. A progress bar is shown on
    stderr. Raises `InputError` if a knob is out of range (before anything runs), if the samples have no visual tokens,
    or if the budget cannot be met.
    """
    shape = backbone_for(model).shape
    knobs.check(shape.layers)
    meter = LayerMeter(model, processor, settings.top, distances(shape.layers))
    sweep = _Sweep(model, processor, shape.layers, settings.max_new_tokens)
    others = other_pictures(samples)
    starts = range(0, len(samples), settings.batch_size)
    with _progress() as bar:
        task = bar.add_task("profile", total=len(starts) * (2 + sweep.runs))
        for start in starts:
            batch = samples[start : start + settings.batch_size]
            meter.measure(batch)
            bar.advance(task)
            meter.measure_across(
                batch, [None if j is None else samples[j] for j in others[start : start + len(batch)]], samples[0]
            )
            bar.advance(task)
            sweep.run(batch, lambda: bar.advance(task))
    curves, (dense, exits, entries) = meter.curves(), sweep.qualities()
    tokens = shape.visual_tokens or round(curves.visual_tokens)
    visual = [value or 0.0 for value in curves.intra["visual"]]
    chosen = choose(visual, mean_ilvas(curves), dense.score, [x.score for x in exits], tokens, knobs)
    differ = shape.visual_tokens is None
    return Profile(shape.layers, tokens, differ, len(samples), settings, knobs, curves, dense, exits, entries, chosen)


def distances(layers: int) -> tuple[int, ...]:
    """Return the distances n of ILVAS: an eighth and a quarter of the depth, as HiDrop's 4 and 8 of 32 layers."""
    return tuple(sorted({max(1, (layers + 4) // 8), max(1, (layers + 2) // 4)}))


def mean_ilvas(curves: LayerCurves) -> list[float]:
    """Return ILVAS at boundaries 0.., averaged over the distances, as far as all of them are defined."""
    return [sum(value or 0.0 for value in at) / len(at) for at in zip(*curves.ilvas.values(), strict=False)]


class _Sweep:
    """Runs each batch without a policy, and then with every exit and every entry."""

    def __init__(self, model: Any, processor: Any, layers: int, max_new_tokens: int) -> None:
        self._model, self._processor, self._max_new_tokens = model, processor, max_new_tokens
        self._dense, self._ends = Tally(), end_tokens(model)
        self._exits = [(_one_stage("hidrop/early-exit", x), Tally()) for x in range(layers)]
        self._entries = [(_one_stage("hidrop/late-injection", e), Tally()) for e in range(1, layers)]
        self.runs = 1 + len(self._exits) + len(self._entries)

    def run(self, batch: Sequence[Sample], done: Callable[[], object]) -> None:
        """Add one batch to every tally, calling `done` after each run."""
        inputs = build_inputs(self._processor, [(sample.images(), sample.question) for sample in batch])
        inputs = inputs.to(self._model.device, self._model.dtype)
        dense = generate(self._model, self._processor, inputs, None, self._max_new_tokens)
        self._dense.add(batch, dense, dense, self._ends)
        done()
        for policy, tally in self._exits + self._entries:
            given = generate(self._model, self._processor, inputs, policy, self._max_new_tokens)
            tally.add(batch, dense, given, self._ends)
            done()

    def qualities(self) -> tuple[Quality, tuple[Quality, ...], tuple[Quality, ...]]:
        """Return the quality without a policy, by exit and by entry; entry 0 is the model as it is."""
        dense = self._dense.quality()
        exits = tuple(tally.quality() for _, tally in self._exits)
        return dense, exits, (dense, *(tally.quality() for _, tally in self._entries))


def _one_stage(use: str, at: int) -> Policy:
    return policy_from_dict({"name": f"{use.replace('/', '-')}-at-{at}", "stages": {"sweep": {"use": use, "at": at}}})


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
