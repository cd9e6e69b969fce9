"""The search at one budget: generations of policies, proposed from the verdicts on all earlier ones."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import dropflow
from dropflow import Policy
from dropflow.backbone.backbone import backbone_for
from dropflow.backbone.flops import vision_only
from dropflow.errors import DropflowError
from dropflow.policy.cost_budget import CostBudget
from dropflow.policy.plan import resolve
from dropflow.policy.solve import SIZE
from dropflow_lab.compare.same_plan import meaning
from dropflow_lab.errors import InputError
from dropflow_lab.store.claims import in_order
from dropflow_lab.store.digests import digest_of_code
from dropflow_lab.tune.judge import Judge, Verdict
from dropflow_lab.tune.methods import Method
from dropflow_lab.tune.rescaled import rescaled
from dropflow_lab.tune.space import Space, mutated

if TYPE_CHECKING:
    from optuna.study import Study as Optuna

_TRIES = 200
"""Proposals after which a generation is closed even if it is not full, where most do not fit the backbone."""
_PARENTS = 4
"""Best policies that are mutated."""
_LEAST = 1e-6
"""Smallest divergence that counts, in nats, as the search compares logarithms."""


@dataclass(frozen=True)
class Search:
    """How long and how to search at each budget."""

    trials: int = 96
    """Policies to try, beside the shipped ones."""
    generation: int = 8
    """Policies proposed together, without the verdicts on each other: what several processes can share."""
    seed: int = 0


@dataclass(frozen=True)
class Trial:
    """One policy and its verdict."""

    policy: Policy
    """With every number solved for the backbone."""
    verdict: Verdict
    published: bool
    """Whether it is a shipped policy, or the layer profile's, at this budget; otherwise found by the search."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Its place in the space; empty for a shipped policy."""
    relative: float = 0.0
    """Logarithm of its divergence, estimated from the questions asked where it was given up."""


@dataclass
class Searched:
    """Everything tried at one budget."""

    budget: CostBudget
    trials: list[Trial] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """Shipped policy -> why it cannot run at this budget."""

    @property
    def best(self) -> Trial:
        """The one that is closest to the model, of those that answered every question."""
        return self.ranked[0]

    @property
    def ranked(self) -> list[Trial]:
        """All trials, those given up last, each by their divergence; of equal ones, the earlier."""
        return sorted(self.trials, key=lambda trial: (trial.verdict.stopped, trial.relative))


def require_optuna() -> None:
    """Raise `InputError` if Optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise InputError("tuning needs Optuna: pip install 'dropflow[tune]'") from None


def search(
    judge: Judge, budget: CostBudget, methods: Sequence[Method], published: Sequence[Policy], how: Search
) -> Searched:
    """Try the published policies at this budget, and then generation after generation of new ones.

    What is proposed follows from the seed and from the verdicts on earlier generations alone, so that any number of
    processes on one folder find what one process finds, and an interrupted search continues.
    """
    require_optuna()
    backbone = backbone_for(judge.model)
    work = partial(vision_only, shape=backbone.decoder_widths)
    found = Searched(budget)
    seen: set[Any] = set()
    starts: list[Policy] = []
    for policy in published:
        try:
            scaled = rescaled(policy, backbone.shape, budget, work)
            with dropflow.attach(judge.model, scaled):
                key = meaning(scaled, backbone.shape)
        except DropflowError as error:
            found.refused[policy.name] = str(error)
            continue
        if key not in seen:
            seen.add(key)
            starts.append(scaled)
    for start in range(0, len(starts), how.generation):
        _judge(judge, found, [(policy, {}) for policy in starts[start : start + how.generation]], published=True)
    space = Space([method for method in methods if _fits(judge, method)], backbone.shape, budget)
    proposing = _Proposing(judge, space, how, found, seen)
    while (generation := proposing.next()) is not None:
        _judge(judge, found, generation, published=False)
    if not found.trials:
        raise InputError("tune: no policy fits this model at this budget; name other methods, or another budget")
    return found


def _fits(judge: Judge, method: Method) -> bool:
    """Whether the model can run a method, and its number of tokens can be told beforehand."""
    shape = backbone_for(judge.model).shape
    middle = shape.layers // 2
    window = method.place in ("exit", "inject")
    options = {"use": method.use, method.boundary: middle} if window else method.options(0.5, middle)
    try:
        with dropflow.attach(judge.model, {"name": "fits", "stages": {"only": options}}) as flow:
            return None not in flow.plan.schedule(shape.visual_tokens or SIZE).per_layer
    except DropflowError:
        return False


def _judge(
    judge: Judge, found: Searched, policies: Sequence[tuple[Policy, Mapping[str, Any]]], *, published: bool
) -> None:
    """Judge policies against the best one so far, and add them."""
    rival = found.best if found.trials else None
    kl = () if rival is None else rival.verdict.kl
    verdicts = in_order(partial(judge.verdict, policy, kl) for policy, _ in policies)
    found.trials += [
        Trial(policy, verdict, published, parameters, _relative(verdict, rival))
        for (policy, parameters), verdict in zip(policies, verdicts, strict=True)
    ]


def solved_for(judge: Judge, policy: Policy) -> Policy:
    """The policy with its numbers solved for the judge's model, and without stages that then drop nothing."""
    backbone = backbone_for(judge.model)
    work = partial(vision_only, shape=backbone.decoder_widths)
    plan = resolve(policy, backbone.shape, backbone.facts(), work)
    counts = plan.schedule(backbone.shape.visual_tokens or SIZE).per_layer
    idle = {
        name
        for name, forecast in plan.forecasts.items()
        if forecast.keeps and all(at > 0 and counts[at] == counts[at - 1] for at in forecast.keeps)
    }
    return replace(plan.policy, stages={name: use for name, use in plan.policy.stages.items() if name not in idle})


def _relative(verdict: Verdict, rival: Trial | None) -> float:
    """Logarithm of the divergence; of a policy that was given up, on as many questions as the rival answered."""
    own = math.log(verdict.distance + _LEAST)
    if not verdict.stopped or rival is None:
        return own
    same = rival.verdict.kl[: len(verdict.kl)]
    return own - math.log(sum(same) / len(same) + _LEAST) + rival.relative


class _Proposing:
    """Proposes the policies of each generation; the first process that asks decides for all."""

    def __init__(self, judge: Judge, space: Space, how: Search, found: Searched, seen: set[Any]) -> None:
        self._judge, self._space, self._how, self._found, self._seen = judge, space, how, found, seen
        self._proposed = 0

    def next(self) -> list[tuple[Policy, dict[str, Any]]] | None:
        """The next generation, policies and their parameters; `None` when enough were tried."""
        count = min(self._how.generation, self._how.trials - self._proposed)
        if count <= 0:
            return None
        facts = self._judge.facts | {
            "budget": self._space.budget.model_dump(exclude_none=True),
            "methods": [asdict(method) for method in self._space.methods],
            "search": asdict(self._how),
            "code": digest_of_code([], ["dropflow_lab.tune"]),
            "tried": [[trial.policy.to_dict(), trial.relative] for trial in self._found.trials],
        }
        name = f"proposals-{self._proposed}"

        def once() -> list[dict[str, Any]]:
            return self._judge.finished.once(name, facts, partial(self._propose, count), list, list)

        (generation,) = in_order([once])
        new = [(self._policy(place, number), place) for number, place in enumerate(generation)]
        self._proposed += count
        self._seen |= {meaning(policy, self._space.shape) for policy, _ in new}
        return new or None

    def _policy(self, parameters: dict[str, Any], number: int) -> Policy:
        """The policy of a place in the space, solved."""
        from optuna.trial import FixedTrial

        data = self._space.policy(FixedTrial(parameters), self._name(number))
        return solved_for(self._judge, dropflow.load_policy(data))

    def _name(self, number: int) -> str:
        return f"tuned-{self._proposed + number}"

    def _propose(self, count: int) -> list[dict[str, Any]]:
        study, chance = self._study(), random.Random(f"{self._how.seed}-{self._proposed}")
        starts = self._starts()
        found: list[dict[str, Any]] = []
        keys = set(self._seen)
        for attempt in range(_TRIES):
            if len(found) == count:
                break
            enqueued = starts.pop(0) if starts else self._mutant(study, chance) if attempt % 2 else None
            if enqueued is not None:
                study.enqueue_trial(enqueued)
            trial = study.ask()
            data = self._space.policy(trial, self._name(len(found)))
            key = self._key(data)
            if key is None or key in keys:
                study.tell(trial, state=_failed())
                continue
            keys.add(key)
            found.append(dict(trial.params))
        return found

    def _key(self, data: Mapping[str, Any]) -> Any:
        """What a proposal means on the backbone; `None` if it does not fit."""
        try:
            policy = solved_for(self._judge, dropflow.load_policy(data))
            with dropflow.attach(self._judge.model, policy):
                return meaning(policy, self._space.shape)
        except DropflowError:
            return None

    def _starts(self) -> list[dict[str, Any]]:
        """Places of the published policies in the space, the closest to the model first, not yet proposed."""
        published = [trial for trial in self._found.ranked if trial.published]
        places = (self._space.parameters_of(trial.policy) for trial in published)
        both = (place | {"positions": one} for place in places if place for one in (place["positions"], "persistent"))
        return list(both)[self._proposed :]

    def _mutant(self, study: Optuna, chance: random.Random) -> dict[str, Any] | None:
        """One of the best policies of the search, changed a little."""
        best = [trial for trial in self._found.ranked if trial.parameters][:_PARENTS]
        if not best:
            return None
        parent = chance.choice(best).parameters
        known = {name: kind for trial in study.get_trials(deepcopy=False) for name, kind in trial.distributions.items()}
        return mutated(parent, known, chance)

    def _study(self) -> Optuna:
        """A study in memory with everything that the search has tried."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=self._how.seed + self._proposed, multivariate=True, group=True, constant_liar=True
            )
        study = optuna.create_study(sampler=sampler)
        for trial in self._found.trials:
            if trial.parameters:
                parameters = dict(trial.parameters)
                recorded = optuna.trial.FixedTrial(parameters)
                self._space.policy(recorded, "recorded")
                kinds = {name: recorded.distributions[name] for name in parameters}
                study.add_trial(optuna.trial.create_trial(params=parameters, distributions=kinds, value=trial.relative))
        return study


def _failed() -> Any:
    from optuna.trial import TrialState

    return TrialState.FAIL
