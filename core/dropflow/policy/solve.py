"""Solves the knobs that a policy marks `solve`, so that it costs what its budget allows on a backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dropflow.errors import PolicyError
from dropflow.policy.cost_budget import CostBudget, Path, Work, kind_of, put
from dropflow.policy.policy import Policy
from dropflow.policy.schedule import Schedule
from dropflow.units import BackboneShape, Scale

SIZE = 576
"""Visual tokens of the image that shares are solved for where images differ in size."""
_STEPS = 24

Schedules = Callable[[Policy, int], Schedule]
"""The schedule of a policy without marks, for an image of a number of tokens; raises `PolicyError`."""


def solve(policy: Policy, scale: Scale, schedules: Schedules, work: Work | None) -> Policy:
    """Return the policy with a number for every knob marked `solve`, and no budget: it spends as much as it may.

    A boundary is tried at every layer. Token counts are those of a pyramid: the first knob keeps a share r of what
    reaches it, the next one r^2, and so on, each within the fixed counts before and after it in its mapping; r is found
    by bisection, and what rounding leaves over goes to the first knobs. On a backbone whose images differ in size, and
    where numbers are rescaled, the solved counts are written as shares.

    Raises `PolicyError` where the budget cannot be met, giving the costs that can be reached.
    """
    assert policy.budget is not None
    knobs = _knobs(policy, scale)
    tokens = scale.target.visual_tokens or (policy.tuned_for.visual_tokens if policy.tuned_for else SIZE)
    trial = _Trial(policy, policy.budget, scale, tokens, knobs, schedules, work)
    found = trial.best_boundary() if knobs[0].kind == "boundary" else trial.best_counts()
    return trial.policy_with(found)


def solved_numbers(policy: Policy, solved: Policy) -> dict[str, int | float]:
    """What each mark of `policy` became in `solved`, by its path in the policy file."""
    found = {}
    for name, use in policy.stages.items():
        for path in use.solve:
            value: Any = solved.stages[name].options.model_dump()
            for key in path:
                value = value[key]
            found[f"stages.{name}.{'.'.join(map(str, path))}"] = value
    return found


@dataclass(frozen=True)
class _Knob:
    stage: str
    path: Path
    kind: str
    low: int
    """Fewest tokens: those of fixed counts after it in its mapping."""
    high: int
    """Most tokens: those of fixed counts before it."""


def _knobs(policy: Policy, scale: Scale) -> list[_Knob]:
    """All marked knobs, in the order of the stages, and of the boundaries inside one."""
    found = [knob for name, use in policy.stages.items() for knob in _knobs_of(policy, name, use.solve, scale)]
    boundaries = [knob for knob in found if knob.kind == "boundary"]
    if boundaries and len(found) > 1:
        where = ", ".join(f"stages.{knob.stage}.{'.'.join(map(str, knob.path))}" for knob in found)
        raise PolicyError(f"budget: expected one boundary or any number of token counts marked `solve`, got {where}")
    return found


def _knobs_of(policy: Policy, name: str, paths: Sequence[Path], scale: Scale) -> list[_Knob]:
    use = policy.stages[name]
    whole = scale.target.visual_tokens or SIZE
    found = []
    for path in paths:
        low, high = 1, whole
        siblings = getattr(use.options, path[0]) if len(path) == 2 else None
        if isinstance(siblings, Mapping):
            own = scale.boundary(path[1], f"stages.{name}.{path[0]}.{path[1]}")
            for depth, value in siblings.items():
                if (path[0], depth) in paths:
                    continue
                where = f"stages.{name}.{path[0]}.{depth}"
                count = scale.tokens(value, where).of(whole)
                low, high = (max(low, count), high) if scale.boundary(depth, where) > own else (low, min(high, count))
        found.append(_Knob(name, path, str(kind_of(type(use.options), path)), low, high))
    return sorted(found, key=lambda knob: scale.boundary(knob.path[1], "") if len(knob.path) == 2 else 0)


@dataclass(frozen=True)
class _Trial:
    """Tries numbers for the knobs."""

    policy: Policy
    budget: CostBudget
    scale: Scale
    tokens: int
    """Visual tokens of one image."""
    knobs: Sequence[_Knob]
    schedules: Schedules
    work: Work | None

    def best_counts(self) -> list[int]:
        """The counts of the largest pyramid within the budget."""
        whole = self._at_entry()
        lowest = self._pyramid(0.0, whole)
        self._check(self.cost(lowest), self._cost_or_none(self._pyramid(1.0, whole)))
        low, high = 0.0, 1.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            if self._fits(self._pyramid(middle, whole)):
                low = middle
            else:
                high = middle
        counts = self._pyramid(low, whole)
        for number, knob in enumerate(self.knobs):
            fits, too_many = counts[number], min(knob.high, whole) + 1
            while too_many - fits > 1:
                middle_count = (fits + too_many) // 2
                if self._fits([*counts[:number], middle_count, *counts[number + 1 :]]):
                    fits = middle_count
                else:
                    too_many = middle_count
            counts[number] = fits
        return counts

    def best_boundary(self) -> list[int]:
        """The boundary of the highest cost within the budget, the first of equal ones."""
        costs = {at: self._cost_or_none([at]) for at in range(self.scale.target.layers + 1)}
        known = {at: cost for at, cost in costs.items() if cost is not None}
        if not known:
            self.cost([self.scale.target.layers // 2])  # raises what is wrong with it
        self._check(min(known.values()), max(known.values()))
        limit = self.limit
        return [max((at for at, cost in known.items() if cost <= limit), key=lambda at: known[at])]

    @property
    def limit(self) -> float:
        """What the policy may cost."""
        return self.budget.limit(self.scale, self.tokens) + 1e-9

    def cost(self, values: Sequence[int]) -> float:
        """What the policy costs with these numbers; raises `PolicyError` where it cannot be told."""
        shape: BackboneShape = self.scale.target
        schedule = self.schedules(self.policy_with(values), self.tokens)
        cost = self.budget.spent(schedule, shape, self.tokens, self.work)
        if cost is None:
            raise PolicyError(
                "budget: cannot be solved, since the data decides how many tokens some stages leave; give them counts"
            )
        return cost

    def policy_with(self, values: Sequence[int]) -> Policy:
        """The policy with these numbers, without budget and marks."""
        options = {name: use.options.model_dump(exclude_none=True) for name, use in self.policy.stages.items()}
        for knob, value in zip(self.knobs, values, strict=True):
            options[knob.stage] = put(options[knob.stage], knob.path, self._written(knob, value))
        stages = {
            name: replace(use, options=type(use.options).model_validate(options[name]), solve=()) if use.solve else use
            for name, use in self.policy.stages.items()
        }
        return replace(self.policy, stages=stages, budget=None)

    def _written(self, knob: _Knob, value: int) -> int | float:
        """A number as the policy's own scale reads it: a share where it would scale an absolute one."""
        target, tuned = self.scale.target, self.scale.tuned_for
        if knob.kind == "boundary":
            same = tuned is None or tuned.layers == target.layers or not value
            return value if same else value / target.layers
        same = target.visual_tokens is not None and (tuned is None or tuned.visual_tokens == target.visual_tokens)
        # a quarter more, so that rounding down and rounding to the nearest give the same count
        return value if same else min(1.0, round((value + 0.25) / self.tokens, 6))

    def _pyramid(self, share: float, whole: int) -> list[int]:
        return [min(max(round(whole * share**step), 1, knob.low), knob.high) for step, knob in enumerate(self.knobs, 1)]

    def _at_entry(self) -> int:
        """Tokens that reach the LLM where no knob drops any; all of them if that cannot be told."""
        try:
            entry = self.schedules(self.policy_with([self.tokens] * len(self.knobs)), self.tokens).entry
        except PolicyError:
            entry = None
        return entry or self.tokens

    def _fits(self, values: Sequence[int]) -> bool:
        cost = self._cost_or_none(values)
        return cost is not None and cost <= self.limit

    def _cost_or_none(self, values: Sequence[int]) -> float | None:
        try:
            return self.cost(values)
        except PolicyError:  # such as keeps that grow
            return None

    def _check(self, least: float, most: float | None) -> None:
        if not least <= self.limit or (most is not None and most < self.limit - 2e-9):
            reach = f"at least {least:.4g}" if most is None else f"{least:.4g} to {most:.4g}"
            raise PolicyError(
                f"budget.{self.budget.kind}: {self.limit:.4g} cannot be met by the knobs marked `solve`, which reach "
                f"{reach}; change the budget, or numbers that are fixed"
            )
