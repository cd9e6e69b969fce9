"""Which stages the tuner can mix, and in which place, told from the options they take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from dropflow import Depth, Stage, Tokens
from dropflow.errors import nearest
from dropflow.lifecycle.hooks import PROJECT
from dropflow.policy import registry
from dropflow_lab.errors import InputError

Place = Literal["entry", "prune", "exit", "inject"]
"""Before the LLM; at a boundary; where vision leaves; where it enters."""
CONTROLS = "control/"
"""Prefix of the controls, which are mixed only if they are named."""


@dataclass(frozen=True)
class Method:
    """One stage in one place."""

    use: str
    """Registered name of the stage."""
    place: Place
    tokens: tuple[str, ...] = ()
    """Options that are numbers of tokens, or (`mapping`) the one that maps boundaries to them."""
    boundary: str = ""
    """Option that is the boundary; empty where `tokens` names it or there is none."""
    mapping: bool = False
    shares: tuple[tuple[str, float, float], ...] = ()
    """Other options that are numbers between two bounds: name, least and most."""

    def options(self, keep: int | float | str, at: int | float | None = None) -> dict[str, Any]:
        """Options that keep so many tokens, from boundary `at` on."""
        if self.mapping:
            return {"use": self.use, self.tokens[0]: {at: keep}}
        boundary = {} if at is None or not self.boundary else {self.boundary: at}
        return {"use": self.use, **dict.fromkeys(self.tokens, keep), **boundary}


def find_methods(named: Iterable[str] = ()) -> list[Method]:
    """Return every method of the stages named, or of all but the controls and those that let vision enter late.

    Late entry changes what a model reads so much that, untrained, no policy with it is close to the model. Raises
    `InputError` for a name that is not registered, and for a stage that takes no number of tokens and no boundary.
    """
    known = registry.names(registry.STAGES)
    chosen = list(named)
    for name in chosen:
        if name not in known:
            raise InputError(f"--methods: no stage named {name!r}; {nearest(name, known)}")
        if not methods_of(name):
            raise InputError(f"--methods: {name} takes no number of tokens per image and no boundary to search for")
    names = chosen or [name for name in known if not name.startswith(CONTROLS)]
    found = [method for name in names for method in methods_of(name)]
    return found if chosen else [method for method in found if method.place != "inject"]


def methods_of(use: str) -> list[Method]:
    """Return the places in which a registered stage can be mixed; none where its options are of another kind."""
    stage: type[Stage[Any]] = registry.load(registry.STAGES, use)
    hints = get_type_hints(stage.Options, include_extras=True)
    kinds = {name: _kind(hint) for name, hint in hints.items() if name in stage.Options.model_fields}
    mappings = [name for name, kind in kinds.items() if kind == "mapping"]
    tokens = tuple(name for name, kind in kinds.items() if kind == "tokens")
    boundaries = [name for name, kind in kinds.items() if kind == "boundary"]
    shares = _shares(stage, kinds)
    found: list[Method] = []
    if _has(stage, "exit") and boundaries:
        found.append(Method(use, "exit", boundary=boundaries[0]))
    if _has(stage, "inject") and boundaries:
        found.append(Method(use, "inject", boundary=boundaries[0]))
    if _has(stage, "prune") and mappings:
        found.append(Method(use, "prune", (mappings[0],), mapping=True, shares=shares))
    elif _has(stage, "prune") and tokens and boundaries:
        found.append(Method(use, "prune", tokens, boundaries[0], shares=shares))
    first = bool(boundaries) and stage.Options.model_fields[boundaries[0]].default == 0
    if tokens and ((_has(stage, "encode") and not boundaries) or (_has(stage, "prune") and first)):
        found.append(Method(use, "entry", tokens, shares=shares))
    asked = {*tokens, *mappings, *boundaries}
    needed = {name for name, field in stage.Options.model_fields.items() if field.is_required()}
    return found if needed <= asked else []


def _has(stage: type[Stage[Any]], hook: str) -> bool:
    return hasattr(getattr(stage, hook, None), f"{PROJECT}_impl")


def _kind(hint: Any) -> str:
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if Tokens in members:
        return "tokens"
    if Depth in members:
        return "boundary"
    for member in members:
        if get_origin(member) is dict and get_args(member)[0] == Depth and _kind(get_args(member)[1]) == "tokens":
            return "mapping"
    return "share" if any(member is float or _is_annotated_float(member) for member in members) else ""


def _is_annotated_float(hint: Any) -> bool:
    return get_origin(hint) is Annotated and get_args(hint)[0] is float


def _shares(stage: type[Stage[Any]], kinds: Mapping[str, str]) -> tuple[tuple[str, float, float], ...]:
    """Options that are floats with two bounds."""
    found = []
    for name, kind in kinds.items():
        low, high = _bounds(stage.Options.model_fields[name].metadata) if kind == "share" else (None, None)
        if low is not None and high is not None:
            found.append((name, low, high))
    return tuple(found)


def _bounds(metadata: Sequence[Any]) -> tuple[float | None, float | None]:
    """Least and most, a little inside where a bound itself is excluded."""
    low = high = None
    for one in metadata:
        if getattr(one, "ge", None) is not None:
            low = float(one.ge)
        if getattr(one, "gt", None) is not None:
            low = float(one.gt) + 0.01
        if getattr(one, "le", None) is not None:
            high = float(one.le)
        if getattr(one, "lt", None) is not None:
            high = float(one.lt) - 0.01
    return low, high
