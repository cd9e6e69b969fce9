"""Recognises equivalent policies: the same stages, with numbers that resolve to the same values on a backbone."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from dropflow import BackboneShape, Depth, Policy, Scale, Tokens


def meaning(policy: Policy, shape: BackboneShape) -> Hashable:
    """Return a key for what `policy` does on a backbone of `shape`; equivalent policies have equal keys.

    Layers and tokens are compared as resolved for the backbone, every other option as written; the name does not
    matter.
    """
    tuned = policy.tuned_for
    scale = Scale(shape, BackboneShape(tuned.layers, tuned.visual_tokens) if tuned else None, policy.rescale)
    stages = []
    for name, use in policy.stages.items():
        hints = get_type_hints(type(use.options), include_extras=True)
        options = {key: _number(hints[key], value, scale) for key, value in use.options}
        stages.append((name, use.stage, repr(options), use.solve))
    return tuned and (tuned.layers, tuned.visual_tokens), policy.positions, policy.budget, tuple(stages)


def _number(hint: Any, value: Any, scale: Scale) -> Any:
    """Resolve the depths and tokens in an option's value to boundaries and budgets."""
    if isinstance(value, int | float) and hint in (Depth, Tokens):
        return scale.boundary(value, "") if hint == Depth else scale.tokens(value, "")
    inner = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return _number(inner[0], value, scale)
    if get_origin(hint) is dict and isinstance(value, Mapping):
        return {_number(inner[0], key, scale): _number(inner[1], one, scale) for key, one in value.items()}
    if get_origin(hint) in (list, tuple) and isinstance(value, Sequence):
        return [_number(inner[0], one, scale) for one in value]
    return value
