"""Refuses places on the vision side at which stages cannot leave whole units out of a packed tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from dropflow.engine.model.arguments import annotated_parameters
from dropflow.errors import UnsupportedModel

if TYPE_CHECKING:
    from dropflow.backbone.packed_tower import PackedTower
    from dropflow.lifecycle.stage import EncodeBoundary

T = TypeVar("T")
Place = tuple[str, "EncodeBoundary"]
"""Name of a stage, and a place before the output at which it works."""


def place_faults(tower: PackedTower | None, boundaries: Sequence[Place], taps: Sequence[tuple[str, int]]) -> list[str]:
    """Errors for stages on pixels without a packed tower, and in one otherwise than unit by unit.

    `taps` are the layers whose attention stages read: not possible in a tower out of which units are left.
    """
    if tower is None:
        return [
            f"stages.{name}: works on pixels, but this model's vision tower is not one out of which units can be left "
            "(fact 'units'); name another place on the vision side"
            for name, boundary in boundaries
            if boundary == "pixels"
        ]
    if not boundaries:
        return []
    _check_blocks(tower)
    inside = _first_of_each([(name, place) for name, place in boundaries if _inside_units(place)])
    beyond = _first_of_each(
        [
            (name, place)
            for name, place in boundaries
            if not _inside_units(place) and (isinstance(place, int | float) and not 0 <= place < tower.depth)
        ]
    )
    faults = [
        f"stages.{name}: works at {place!r} of the vision encoder, on rows inside units of {tower.unit} that this "
        "model joins; work with whole units: on 'pixels', before a layer, or on the output"
        for name, place in inside.items()
    ]
    faults += [
        f"stages.{name}: works at boundary {place} of the vision encoder, expected 0 to {tower.depth - 1}; name a "
        "layer that exists"
        for name, place in beyond.items()
    ]
    return faults + [
        f"stages.{name}: reads the attention of vision layer {layer}, but stages.{boundaries[0][0]} leaves units out "
        "of the tower; leave one of the two stages out"
        for name, layer in _first_of_each(taps).items()
        if name not in inside
    ]


def _inside_units(place: EncodeBoundary) -> bool:
    return place == "features" or (isinstance(place, float) and place % 1 != 0)


def _first_of_each(found: Sequence[tuple[str, T]]) -> dict[str, T]:
    """The first entry of each stage, in their order."""
    first: dict[str, T] = {}
    for name, value in found:
        first.setdefault(name, value)
    return first


def _check_blocks(tower: PackedTower) -> None:
    """Raise `UnsupportedModel` for blocks with an argument that the engine would have to cut, but does not know."""
    known: set[Any] = {"hidden_states", "kwargs", *tower.block_rows, *tower.block_borders, *tower.block_others}
    for block in tower.owner._modules[tower.blocks]:
        unknown = (annotated_parameters(block) or {}).keys() - known
        if unknown:
            raise UnsupportedModel(
                f"{type(block).__name__}: takes {', '.join(sorted(unknown))}, unknown to the engine, which would have "
                "to cut it to the units that are left; name it in `PackedTower` of the adapter"
            )
