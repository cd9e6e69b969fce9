"""What a stage states about itself in another form than expected."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Set
from numbers import Integral, Real
from typing import Any

from dropflow.errors import quoted
from dropflow.lifecycle.stage import Forecast, Stage


def attribute_faults(name: str, stage: Stage[Any]) -> Iterator[str]:
    """One line for each property of a stage, called `name` in its policy, that is no value of its type."""
    forecast: Any = stage.forecast()
    if not isinstance(forecast, Forecast):
        yield f"stages.{name}: expected a `Forecast` from `forecast` of {_named(stage)}, got {quoted(forecast)}"
        return
    for attribute, (fits, expected) in _EXPECTED.items():
        value = getattr(stage, attribute)
        if not fits(value):
            yield f"stages.{name}: expected {expected} as `{attribute}` of {_named(stage)}, got {quoted(value)}"


def _named(stage: Stage[Any]) -> str:
    return type(stage).__name__


def _whole(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


def _count(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 0


def _place(value: object) -> bool:
    """Whether a value is an `EncodeBoundary`."""
    number = not isinstance(value, bool) and isinstance(value, Real)
    return value is None or number or (isinstance(value, str) and value in ("pixels", "features"))


def _names(value: object) -> bool:
    return isinstance(value, Set) and all(isinstance(name, str) for name in value)


def _several(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    """Whether a value is a collection of such values; a single one is a mistake that is easily made."""
    return lambda value: isinstance(value, Collection) and not isinstance(value, str) and all(map(fits, value))


_LAYERS = _several(_whole), "a tuple of decoder layers, such as (2,)"
_EXPECTED: dict[str, tuple[Callable[[object], bool], str]] = {
    "prune_at": (_several(_whole), "a tuple of boundaries, such as (2,)"),
    "encode_at": (_several(_place), "a tuple of places on the vision side, such as (None,) or ('features',)"),
    "taps": _LAYERS,
    "vision_taps": (_several(_whole), "a tuple of layers of the vision encoder, such as (-2,)"),
    "decode_taps": _LAYERS,
    "decode_reads_at": _LAYERS,
    "carries": (_count, "a whole number from 0"),
    "decode_every": (_count, "a whole number from 0"),
    "needs": (_names, "a set of facts, such as frozenset({'grid'})"),
}
"""Property -> whether a value is of its type, and what is expected."""
