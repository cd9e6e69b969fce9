"""Resolves a policy for one backbone shape: makes its stages, and checks the rules that span them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dropflow.errors import PolicyError
from dropflow.lifecycle.hooks import HOOKS, Hooks
from dropflow.lifecycle.lazy import lazy
from dropflow.lifecycle.stage import EncodeBoundary, Forecast, Stage, StageContext, Window
from dropflow.policy.cost_budget import Work
from dropflow.policy.late_entry import window_faults
from dropflow.policy.policy import Policy, StageUse
from dropflow.policy.ranking import ranking_faults
from dropflow.policy.schedule import Schedule, encoded, schedule
from dropflow.policy.solve import solve
from dropflow.policy.stage_faults import attribute_faults
from dropflow.units import BackboneShape, Budget, Scale


@dataclass(frozen=True)
class Plan:
    """A policy resolved for one backbone, with every number absolute."""

    policy: Policy
    shape: BackboneShape
    stages: tuple[tuple[str, Stage[Any]], ...]
    hooks: Hooks
    window: Window
    """Where vision enters and exits, according to the stages' forecasts."""
    serial: int = field(default_factory=itertools.count(1).__next__, compare=False)
    """A unique number that identifies what was made under this plan."""

    @lazy
    def forecasts(self) -> dict[str, Forecast]:
        """Forecast of each stage, by its name in the policy."""
        return {name: stage.forecast() for name, stage in self.stages}

    @lazy
    def prune_at(self) -> dict[int, tuple[tuple[str, Stage[Any]], ...]]:
        """Boundary -> stages asked to prune there, in policy order."""
        asked: dict[int, tuple[tuple[str, Stage[Any]], ...]] = {}
        for name, stage in self.hooks.implementers("prune"):
            for boundary in stage.prune_at:
                asked[boundary] = (*asked.get(boundary, ()), (name, stage))
        return asked

    @lazy
    def asks_from(self) -> int:
        """The first boundary at which a stage prunes, and so may read the question; the number of layers for none.

        Before it, the states of images and of the text before them are the same for every question.
        """
        return min((*self.prune_at, self.shape.layers))

    @lazy
    def ranked_by(self) -> dict[int, int]:
        """Boundary -> the layer whose attention ranks there, where stages rank and the boundary's layer has none."""
        found = {}
        for boundary, stages in self.prune_at.items():
            layer = self.shape.ranks_by(boundary)
            if layer not in (None, boundary) and any(stage.ranks for _, stage in stages):
                found[boundary] = layer
        return found

    @lazy
    def ranking_taps(self) -> tuple[int, ...]:
        """Decoder layers whose attention `prune` reads after they ran, ascending.

        They are the `taps` of its stages, and stand in for layers without attention (see `BackboneShape.ranks_by`).
        """
        stages = (stage for asked in self.prune_at.values() for _, stage in asked)
        taps = {self.shape.ranks_by(layer) for stage in stages for layer in stage.taps}
        return tuple(sorted({layer for layer in taps if layer is not None} | set(self.ranked_by.values())))

    @lazy
    def states_taps(self) -> frozenset[int]:
        """Decoder layers whose values and states `prune` reads after they ran."""
        stages = (stage for asked in self.prune_at.values() for _, stage in asked)
        return frozenset(layer for stage in stages if stage.reads_states for layer in stage.taps)

    @lazy
    def encode_at(self) -> dict[EncodeBoundary, tuple[tuple[str, Stage[Any]], ...]]:
        """Place on the vision side -> stages asked to encode there, in policy order."""
        asked: dict[EncodeBoundary, tuple[tuple[str, Stage[Any]], ...]] = {}
        for name, stage in self.hooks.implementers("encode"):
            for boundary in stage.encode_at:
                asked[boundary] = (*asked.get(boundary, ()), (name, stage))
        return asked

    @lazy
    def encodes(self) -> tuple[Forecast, ...]:
        """Forecasts of the stages that encode, in the order in which each acts for the last time."""
        asked = [(name, stage.encode_at) for name, stage in self.hooks.implementers("encode") if stage.encode_at]
        places = {name: max(map(_place, boundaries)) for name, boundaries in asked}
        return tuple(self.forecasts[name] for name in sorted(places, key=lambda name: places[name]))

    @lazy
    def carries(self) -> dict[str, slice]:
        """Stage -> its columns of the numbers that a row carries from `encode` to `prune`; empty for most stages."""
        found, start = {}, 0
        for name, stage in self.stages:
            found[name] = slice(start, start + stage.carries)
            start = found[name].stop
        return found

    @lazy
    def reads_questions(self) -> bool:
        """Whether some stage reads the questions as text."""
        return any(stage.reads_questions for _, stage in self.stages)

    @lazy
    def reads_videos(self) -> bool:
        """Whether some stage works on videos."""
        return any(stage.reads_videos for _, stage in self.stages)

    @property
    def identity(self) -> tuple[Policy, BackboneShape]:
        """Equal for plans that do the same, so that one may continue a cache that the other has written."""
        return self.policy, self.shape

    @lazy
    def uniform(self) -> bool:
        """Whether the stages' forecasts drop nothing in the decoder, so that all its layers hold the same tokens."""
        prunes = (stage for _, stage in self.hooks.implementers("prune"))
        stay = (
            self.forecasts[name].keeps.get(boundary)
            for name, stage in self.hooks.implementers("prune")
            for boundary in stage.prune_at
        )
        return (
            not any(self.hooks.watched(hook) for hook in ("inject", "exit", "decode_cache"))
            and not any(stage.differentiable for stage in prunes)
            and all(budget is not None and (budget.share or 0) >= 1 for budget in stay)
        )

    @property
    def idle(self) -> bool:
        """True when no stage can change anything, so that nothing needs to be installed."""
        return not any(self.hooks.watched(hook) for hook in HOOKS)

    def schedule(self, visual_tokens: int | None = None) -> Schedule:
        """Visual tokens per layer for one image (by default of the shape's size), as forecast."""
        tokens = visual_tokens or self.shape.visual_tokens
        if tokens is None:
            raise PolicyError("schedule: this backbone has no fixed number of visual tokens; say how many")
        keeps: dict[int, list[Budget | None]] = {}
        for forecast in self.forecasts.values():
            for boundary, budget in forecast.keeps.items():
                keeps.setdefault(boundary, []).append(budget)
        on_pixels = [
            self.forecasts[name] if stage.encode_at == ("pixels",) else Forecast(encoded="data")
            for name, stage in self.encode_at.get("pixels", ())
        ]
        return schedule(self.shape.layers, tokens, self.window, keeps, self.encodes, on_pixels)


def resolve(
    policy: Policy, shape: BackboneShape, facts: frozenset[str] | None = None, work: Work | None = None
) -> Plan:
    """Make the stages of `policy` for a backbone of `shape` and check the rules that span stages.

    Numbers written as `solve` are solved first; the plan's policy has them. `facts` are those of the backbone, `None`
    without a model; `work` gives the FLOPs of a layer, for a budget of FLOPs.
    Raises `PolicyError` for absolute numbers tuned for another shape, boundaries beyond the depth, keeps that grow,
    pruning outside the layers in which vision takes part, ranking where no layer has attention, and a budget that
    cannot be met. No weights are touched.
    """
    tuned = policy.tuned_for
    scale = Scale(shape, BackboneShape(tuned.layers, tuned.visual_tokens) if tuned else None, policy.rescale)
    if policy.budget is not None:
        policy = solve(policy, scale, lambda trial, tokens: _planned(trial, scale, facts).schedule(tokens), work)
    return _planned(policy, scale, facts)


def _planned(policy: Policy, scale: Scale, facts: frozenset[str] | None) -> Plan:
    shape = scale.target
    whole = Window(0, shape.layers)
    made: dict[str, Stage[Any]] = {}
    for name, use in policy.stages.items():
        if _sets_window(use.stage):
            made[name] = _made(name, use, StageContext(name, scale, whole, policy.positions, facts))
    window = _window({name: stage.forecast() for name, stage in made.items()}, whole)
    for name, use in policy.stages.items():
        if name not in made:
            made[name] = _made(name, use, StageContext(name, scale, window, policy.positions, facts))
    stages = tuple((name, made[name]) for name in policy.stages)
    plan = Plan(policy, shape, stages, Hooks(stages), window)
    _check_order(plan)
    faults = [*ranking_faults(plan), *window_faults(plan)]
    if faults:
        raise PolicyError("\n".join(faults))
    return plan


def _made(name: str, use: StageUse, context: StageContext) -> Stage[Any]:
    """A stage of the policy; raises `PolicyError` where what it states about itself has another form than expected."""
    stage = use.stage(use.options, context)
    faults = list(attribute_faults(name, stage))
    if faults:
        raise PolicyError("\n".join(faults))
    return stage


def _place(boundary: EncodeBoundary) -> tuple[bool, float]:
    """Sort key for places on the vision side: pixels, the encoder's layers, the projector's input, then its output."""
    if boundary == "pixels":
        return False, -math.inf
    return boundary is None, boundary if isinstance(boundary, int | float) else math.inf


def _sets_window(stage: type[Stage[Any]]) -> bool:
    return any(name in vars(base) for base in stage.__mro__ for name in ("inject", "exit"))


def _window(forecasts: Mapping[str, Forecast], whole: Window) -> Window:
    entries = {n: f.entry for n, f in forecasts.items() if f.entry is not None}
    exits = {n: f.exit for n, f in forecasts.items() if f.exit is not None}
    window = Window(max(entries.values(), default=whole.entry), min(exits.values(), default=whole.exit))
    if entries and window.entry >= window.exit:
        name = max(entries, key=lambda n: entries[n])
        raise PolicyError(
            f"stages.{name}: vision would enter at boundary {window.entry} but is gone from {window.exit} on; "
            "inject before the exit"
        )
    return window


def _check_order(plan: Plan) -> None:
    """Check that prunes lie inside the window and that budgets never grow from one boundary to the next."""
    faults: list[str] = []
    window, tokens = plan.window, plan.shape.visual_tokens
    entry = None if tokens is None else encoded(tokens, plan.encodes)[0]
    smallest = (tokens if entry is None else entry, "the encode stages" if plan.encodes else "the image at entry")
    steps = [(b, n, f.keeps[b]) for n, f in plan.forecasts.items() for b in f.keeps]
    for boundary, name, budget in sorted(steps, key=lambda step: step[0]):
        path = _keep_path(plan, name, boundary)
        if not window.entry <= boundary < window.exit:
            faults.append(
                f"{path}: prunes at boundary {boundary}, but vision is live only from {window.entry} to before "
                f"{window.exit}; prune inside that window"
            )
        limit, by = smallest
        if budget is None or limit is None or (entry is None and budget.tokens is None):
            continue
        count = budget.of(entry or 0) if budget.tokens is None else budget.tokens
        if count > limit:
            faults.append(f"{path}: keeps {count} visual tokens, more than the {limit} left by {by}; keeps cannot grow")
        else:
            smallest = (count, path)
    if faults:
        raise PolicyError("\n".join(faults))


def _keep_path(plan: Plan, name: str, boundary: int) -> str:
    """Path of what the policy keeps after a boundary: an entry of `keep`, `keep` itself, or else the stage."""
    keep = getattr(plan.policy.stages[name].options, "keep", None)
    if keep is None:
        return f"stages.{name}"
    return f"stages.{name}.keep.{boundary}" if isinstance(keep, Mapping) else f"stages.{name}.keep"
