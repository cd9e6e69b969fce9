"""A shipped policy, scaled to a backbone and to a budget: every number of tokens in it times one factor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

from dropflow import BackboneShape, Depth, Policy, Scale, Tokens, load_policy
from dropflow.errors import PolicyError
from dropflow.policy.cost_budget import CostBudget, Work
from dropflow.policy.plan import resolve
from dropflow.policy.policy import StageUse
from dropflow.policy.solve import SIZE

_STEPS = 24
_NEAR = 0.9
"""Least share of the budget that counts as spending it."""


def rescaled(policy: Policy, shape: BackboneShape, budget: CostBudget, work: Work) -> Policy:
    """Return `policy` with its boundaries scaled to the depth of `shape`, and its tokens by one factor to the budget.

    It spends as much of the budget as it can. Raises `PolicyError` where boundaries alone cost more, where it cannot
    spend nine tenths, and where the data decides how many tokens stay.
    """
    tuned = policy.tuned_for
    scale = Scale(shape, BackboneShape(tuned.layers, tuned.visual_tokens) if tuned else None, rescale=True)
    size = shape.visual_tokens or SIZE
    limit = budget.limit(Scale(shape), size) + 1e-9

    def at(factor: float) -> Policy:
        stages = {name: {"use": use.use, **_options(use, scale, factor)} for name, use in policy.stages.items()}
        target = {} if shape.visual_tokens is None else {"tuned_for": _tuned(shape)}
        return load_policy({"name": policy.name, "positions": policy.positions, **target, "stages": stages})

    def cost(factor: float) -> float:
        spent = budget.spent(resolve(at(factor), shape).schedule(size), shape, size, work)
        if spent is None:
            raise PolicyError(f"{policy.name}: the data decides how many tokens it leaves")
        return spent

    least = cost(0.0)
    if least > limit:
        raise PolicyError(f"{policy.name}: costs at least {least:.4g} with its boundaries, more than {limit:.4g}")
    low, high = 0.0, float(size)
    for _ in range(_STEPS):
        middle = (low * high) ** 0.5 if low else high / 64 if high > 1 else high / 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    if cost(low) < _NEAR * limit:
        raise PolicyError(f"{policy.name}: costs at most {cost(low):.4g} within {limit:.4g}")
    return at(low)


def _tuned(shape: BackboneShape) -> dict[str, int | None]:
    return {"layers": shape.layers, "visual_tokens": shape.visual_tokens}


def _options(use: StageUse, scale: Scale, factor: float) -> dict[str, Any]:
    hints = get_type_hints(type(use.options), include_extras=True)
    plain = use.options.model_dump(exclude_none=True)
    return {name: _scaled(hints[name], value, scale, factor) for name, value in plain.items()}


def _scaled(hint: Any, value: Any, scale: Scale, factor: float) -> Any:
    """An option with its boundaries as those of the target, and its tokens times `factor`."""
    if hint == Depth:
        return scale.boundary(value, "")
    if hint == Tokens:
        return _tokens(value, scale, factor)
    inner, kind = get_args(hint), get_origin(hint)
    if kind is dict and isinstance(value, Mapping):
        return {
            _scaled(inner[0], key, scale, factor): _scaled(inner[1], one, scale, factor) for key, one in value.items()
        }
    if kind is list and isinstance(value, list):
        return [_scaled(inner[0], one, scale, factor) for one in value]
    if any(one in inner for one in (Depth, Tokens)) or any(get_origin(one) in (dict, list) for one in inner):
        fitting = [one for one in inner if one in (Depth, Tokens) or get_origin(one) in (dict, list)]
        return _scaled(fitting[0], value, scale, factor)
    return value


def _tokens(value: int | float, scale: Scale, factor: float) -> int | float:
    target = scale.target.visual_tokens
    if value == 0:
        return 0
    if target is None:
        budget = scale.tokens(value, "")
        return min(
            1.0, max(1 / SIZE, (budget.share if budget.share is not None else (budget.tokens or 0) / SIZE) * factor)
        )
    return min(target, max(1, round(scale.tokens(value, "").of(target) * factor)))
