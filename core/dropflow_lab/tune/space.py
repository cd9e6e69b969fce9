"""The space of policies that the tuner searches, as numbers that Optuna proposes."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dropflow import BackboneShape, Policy
from dropflow.policy.cost_budget import SOLVE, CostBudget
from dropflow.policy.solve import SIZE
from dropflow_lab.tune.methods import Method, Place

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import BaseTrial

NONE = "none"
PRUNES = 3
"""Most boundaries to prune at."""
_MOST = 8.0
"""Most tokens before the LLM, as a multiple of the budget's average, where they are pruned further inside it."""
_STRENGTH = 2
"""Parameters that a mutation changes, at most."""


@dataclass(frozen=True)
class Space:
    """Policies of one budget on one backbone."""

    methods: Sequence[Method]
    shape: BackboneShape
    budget: CostBudget

    def policy(self, trial: BaseTrial, name: str) -> dict[str, Any]:
        """Ask `trial` for every parameter, and return the policy as plain data with a budget and numbers to solve."""
        stages: dict[str, Any] = {}
        positions = trial.suggest_categorical("positions", ["persistent", "compact"])
        entry = self._choice(trial, "entry", "entry")
        prunes = self._prunes(trial)
        late, early = self._choice(trial, "inject", "inject"), self._choice(trial, "exit", "exit")
        if late is not None:
            at = trial.suggest_int("inject.at", 1, self.shape.layers // 2)
            stages["inject"] = {"use": late.use, late.boundary: at}
        if entry is not None:
            keep: int | float | str = SOLVE
            if prunes:
                keep = self._before_the_llm(trial.suggest_float("entry.factor", 1.0, _MOST, log=True))
            stages["entry"] = entry.options(keep) | self._shares(trial, "entry", entry)
        for number, (at, method, own) in enumerate(prunes, 1):
            stages[f"prune-{number}"] = method.options(SOLVE, at) | own
        if early is not None:
            at = trial.suggest_int("exit.at", self.shape.layers // 2, self.shape.layers - 1)
            stages["exit"] = {"use": early.use, early.boundary: at}
        return {
            "name": name,
            "positions": positions,
            "budget": self.budget.model_dump(exclude_none=True),
            "stages": stages,
        }

    def parameters_of(self, policy: Policy) -> dict[str, Any] | None:
        """Parameters of a policy near `policy`, whose numbers are those of the backbone; `None` if there are none."""
        found: dict[str, Any] = {"positions": policy.positions, "entry": NONE, "inject": NONE, "exit": NONE}
        found |= {f"prune-{number}": NONE for number in range(1, PRUNES + 1)}
        kept, number = None, 0
        for use in policy.stages.values():
            own = [method for method in self.methods if method.use == use.use]
            options = use.options.model_dump(exclude_none=True)
            method = _fitting(own, options)
            if method is None:
                return None
            if method.place == "entry":
                found["entry"], kept = method.use, sum(options[name] for name in method.tokens)
            elif method.place == "prune":
                boundaries = sorted(options[method.tokens[0]]) if method.mapping else [options[method.boundary]]
                for at in boundaries[: PRUNES - number]:
                    number += 1
                    found |= {f"prune-{number}": method.use, f"prune-{number}.at": at}
            else:
                found |= {method.place: method.use, f"{method.place}.at": options[method.boundary]}
        if kept is not None and number:
            found["entry.factor"] = min(_MOST, max(1.0, kept / self.budget.average(self.shape.visual_tokens or SIZE)))
        return found

    def _prunes(self, trial: BaseTrial) -> list[tuple[int, Method, dict[str, Any]]]:
        """Boundary, method and further options of each pruning, ascending; of two at one boundary, the first."""
        found: dict[int, tuple[int, Method, dict[str, Any]]] = {}
        for number in range(1, PRUNES + 1):
            method = self._choice(trial, f"prune-{number}", "prune")
            if method is not None:
                at = trial.suggest_int(f"prune-{number}.at", 1, self.shape.layers - 1)
                found.setdefault(at, (at, method, self._shares(trial, f"prune-{number}", method)))
        return [found[at] for at in sorted(found)]

    def _choice(self, trial: BaseTrial, name: str, place: Place) -> Method | None:
        methods = {method.use: method for method in self.methods if method.place == place}
        if not methods:
            return None
        return methods.get(trial.suggest_categorical(name, [NONE, *methods]))

    def _shares(self, trial: BaseTrial, name: str, method: Method) -> dict[str, Any]:
        """Further options of a method, each at its default or between its bounds."""
        found = {}
        for option, low, high in method.shares:
            key = f"{name}.{method.use}.{option}"
            if trial.suggest_categorical(f"{key}?", [False, True]):
                found[option] = trial.suggest_float(key, low, high)
        return found

    def _before_the_llm(self, factor: float) -> int | float:
        size = self.shape.visual_tokens
        kept = self.budget.average(size or SIZE) * factor
        return min(1.0, kept / SIZE) if size is None else min(size, round(kept))


def mutated(
    parameters: Mapping[str, Any], distributions: Mapping[str, BaseDistribution], chance: random.Random
) -> dict[str, Any]:
    """Return parameters with one or two of them changed: a number to one nearby, a choice to another one."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found = dict(parameters)
    for name in chance.sample(sorted(parameters), min(len(parameters), chance.randint(1, _STRENGTH))):
        kind, value = distributions[name], parameters[name]
        if isinstance(kind, CategoricalDistribution):
            found[name] = chance.choice([one for one in kind.choices if one != value] or [value])
        elif isinstance(kind, IntDistribution):
            found[name] = min(kind.high, max(kind.low, value + chance.choice([-2, -1, 1, 2])))
        elif isinstance(kind, FloatDistribution):
            wide = value * 0.3 if kind.log else (kind.high - kind.low) * 0.15
            found[name] = min(kind.high, max(kind.low, chance.gauss(value, wide)))
    return found


def _fitting(methods: Sequence[Method], options: Mapping[str, Any]) -> Method | None:
    """The method whose options are given, pruning at a boundary above 0 before anything else."""
    for method in sorted(methods, key=lambda method: method.place == "entry"):
        wanted = {*method.tokens, *([method.boundary] if method.boundary else [])}
        if wanted <= options.keys() and not (method.place == "prune" and options.get(method.boundary) == 0):
            return method
    return None
