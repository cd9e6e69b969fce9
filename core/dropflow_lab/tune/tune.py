"""Tunes policies for a model: a search at every budget, and the scores of what it found on held-out questions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Any

from pydantic import TypeAdapter

from dropflow import Policy
from dropflow.backbone.backbone import backbone_for
from dropflow.policy.cost_budget import CostBudget
from dropflow.policy.solve import SIZE
from dropflow_lab.compare.cost import Cost, measure_cost
from dropflow_lab.compare.figure import pareto_front
from dropflow_lab.inputs.data import Sample
from dropflow_lab.measure.intervals import Gain, Share
from dropflow_lab.profile import Settings
from dropflow_lab.store.claims import in_order
from dropflow_lab.store.digests import digest_of_code
from dropflow_lab.store.finished import Finished
from dropflow_lab.tune.judge import Judge, Verdict
from dropflow_lab.tune.methods import Method
from dropflow_lab.tune.published import profiled
from dropflow_lab.tune.study import Search, Searched, Trial, search

_INSTRUMENTS = ("dropflow_lab.compare.cost", "dropflow_lab.measure")
_Z = 1.959963984540054


@dataclass(frozen=True)
class Ask:
    """How the model is asked, and how much."""

    batch: int = 32
    max_new_tokens: int = 16
    rivals: int = 6
    """Shipped policies that the best one is compared with on held-out questions: the closest to the model."""
    profiled: int = 32
    """Questions of the layer profile; 0 leaves it out."""
    timed: int = 2
    """Questions on which FLOPs, KV and time of the front are measured; 0 leaves that out."""


@dataclass(frozen=True)
class Against:
    """The best policy against another one, on the same held-out questions; intervals are 95 %."""

    policy: Policy
    verdict: Verdict
    kl: tuple[float, float, float]
    """How much closer to the model the best one is, in nats: mean of the paired differences, and its bounds."""
    gain: Gain
    """Difference in accuracy, or in agreement with the model's own answers if no answers are known."""


@dataclass(frozen=True)
class HeldOut:
    """The best policy of one budget on questions it was not chosen by."""

    verdict: Verdict
    score: Share
    """Accuracy, or agreement if no answers are known."""
    dense: Share
    """The same without a policy."""
    against: tuple[Against, ...]


@dataclass(frozen=True)
class Tuned:
    """What was found at one budget."""

    searched: Searched
    best: Trial
    held_out: HeldOut


@dataclass(frozen=True)
class Point:
    """A policy of the Pareto front."""

    trial: Trial
    cost: Cost | None
    """Work, KV bytes and time, measured; `None` if that was not asked for."""


def tune(
    model: Any,
    processor: Any,
    tuning: Sequence[Sample],
    held_out: Sequence[Sample],
    budgets: Iterable[CostBudget],
    methods: Sequence[Method],
    published: Sequence[Policy],
    finished: Finished,
    how: Search,
    asking: Ask,
) -> list[Tuned]:
    """Search at every budget on the questions `tuning`, and score the best policies on `held_out`.

    Processes that tune the same on the same folder share the work. Raises `InputError` where no policy fits.
    """
    judge = Judge(model, processor, tuning, finished, asking.batch, asking.max_new_tokens)
    found = []
    for budget in budgets:
        starts = list(published)
        if asking.profiled:
            settings = Settings(batch_size=asking.batch, max_new_tokens=asking.max_new_tokens)
            size = backbone_for(model).shape.visual_tokens or SIZE
            few, average = tuning[: asking.profiled], budget.average(size)
            own = profiled(model, processor, few, finished, settings, average)
            starts += [] if own is None else [own]
        searched = search(judge, budget, methods, starts, how)
        found.append(Tuned(searched, searched.best, _scored(judge, searched, processor, held_out, asking)))
    return found


def front(tuned: Sequence[Tuned], kind: str) -> list[Trial]:
    """The policies that no other one dominates in divergence and in cost, over all budgets, in order of cost."""
    trials = [trial for one in tuned for trial in one.searched.trials if not trial.verdict.stopped]
    costs = [spent(trial.verdict, kind) for trial in trials]
    points = [(cost, -trial.verdict.distance) for cost, trial in zip(costs, trials, strict=True)]
    return [trials[place] for place in pareto_front(points)]


def spent(verdict: Verdict, kind: str) -> float:
    """What a policy was measured to cost, in the unit of a budget of this kind."""
    return {"average_tokens": verdict.average_tokens, "flops": verdict.flops, "kv": verdict.kv}[kind]


def measured(model: Any, processor: Any, trials: Sequence[Trial], judge: Judge, timed: int) -> list[Point]:
    """Measure work, KV and time of some policies on a few questions."""
    if not timed:
        return [Point(trial, None) for trial in trials]

    def cost(policy: Policy) -> Cost:
        code = digest_of_code([policy], _INSTRUMENTS)
        facts = judge.facts | {"policy": policy.to_dict(), "code": code, "timed": timed}
        measure = partial(measure_cost, model, processor, policy, judge.samples[:timed], rounds=3)
        parse = TypeAdapter(Cost).validate_python
        return judge.finished.once(f"cost-{policy.name}", facts, measure, parse, asdict)

    costs = in_order(partial(cost, trial.policy) for trial in trials)
    return [Point(trial, found) for trial, found in zip(trials, costs, strict=True)]


def _scored(judge: Judge, searched: Searched, processor: Any, held_out: Sequence[Sample], asking: Ask) -> HeldOut:
    """Ask the held-out questions under the best policy and the published ones that come closest to the model."""
    asked = Judge(judge.model, processor, held_out, judge.finished, asking.batch, asking.max_new_tokens)
    rivals = [trial.policy for trial in searched.ranked if trial.published][: asking.rivals]
    best, *others = in_order(partial(asked.verdict, policy) for policy in (searched.best.policy, *rivals))
    known = [place for place, sample in enumerate(held_out) if sample.answer is not None]

    def right(verdict: Verdict) -> list[float]:
        if not known:
            return [float(one) for one in verdict.same]
        return [float(verdict.right[place]) for place in known]

    dense = asked.dense() if known else [True] * len(held_out)
    return HeldOut(
        best,
        Share.of(right(best)),
        Share.of([float(dense[place]) for place in known or range(len(held_out))]),
        tuple(
            Against(policy, verdict, closer(best.kl, verdict.kl), Gain.of(right(best), right(verdict)))
            for policy, verdict in zip(rivals, others, strict=True)
        ),
    )


def closer(own: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Mean of `other` less `own`, question by question, and its 95 % interval by the normal distribution."""
    differences = [theirs - ours for ours, theirs in zip(own, other, strict=True)]
    mean = fmean(differences)
    half = _Z * stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return mean, mean - half, mean + half
