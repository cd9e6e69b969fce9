"""Refuses stages at places of the vision side that a backbone does not have, or where its rows cannot be told apart."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dropflow.engine.attach.packed_refusals import place_faults

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone
    from dropflow.lifecycle.stage import EncodeBoundary
    from dropflow.policy.plan import Plan


def vision_faults(backbone: Backbone, plan: Plan) -> list[str]:
    """Errors for stages at encoder layers that do not exist, or after the layer whose output goes to the LLM."""
    boundaries = [(name, b) for b, stages in plan.encode_at.items() if b is not None for name, _ in stages]
    taps = [(name, layer) for name, stage in plan.stages for layer in stage.vision_taps]
    vision, joined = backbone.vision, _joined_layers(backbone.model.config)
    faults = place_faults(backbone.packed_tower, boundaries, taps)
    if faults or (backbone.packed_tower is not None and boundaries):
        return faults
    if vision is None:
        known = "vision_attention"  # a stage that lists it as needed is refused for that
        unlisted = [name for name, stage in plan.stages if stage.vision_taps and known not in stage.needs]
        return _reading_faults(backbone, dict.fromkeys(name for name, _ in boundaries), taps, unlisted, joined)
    if joined:
        names = dict.fromkeys(name for name, _ in (*boundaries, *taps))
        return [
            f"stages.{name}: works inside the vision encoder, but this model joins the features of several of its "
            f"layers ({joined}), of which each would have to lose the same rows; leave the stage out"
            for name in names
        ]
    outside = [
        (name, b)
        for name, b in boundaries
        if not isinstance(b, str) and not (0 <= b < vision.feature_layer and b % 1 in (0, 0.5))
    ]
    faults = [
        f"stages.{name}: works at boundary {b} of the vision encoder{more}, expected 0 to {vision.feature_layer - 1}, "
        "before the layers that the features for the LLM pass through"
        for name, b, more in _first_of_each(outside)
    ]
    lacking = {
        name: what
        for name, b in boundaries
        for what, lacks in (
            ("on what the projector gets", b == "features" and vision.projector is None),
            ("between attention and feed-forward part of a layer", _inside_layer(b) and vision.sublayers is None),
        )
        if lacks
    }
    faults += [
        f"stages.{name}: works {what}, which this adapter does not name; see `VisionEncoder`"
        for name, what in lacking.items()
    ]
    return faults + _depth_faults(taps, vision.depth)


def _reading_faults(
    backbone: Backbone, inside: Collection[str], taps: Sequence[tuple[str, int]], unlisted: Iterable[str], joined: str
) -> list[str]:
    """Errors for stages that work inside an encoder that can at most be read, or name layers that it does not have."""
    readers = [backbone.reader(modality) for modality in backbone.modalities]
    if joined:
        why = (
            f", but this model joins the features of several of its layers ({joined}), of which each would have to "
            "lose the same rows; leave the stage out"
        )
    else:
        why = ", which this adapter cannot reach; leave the stage out or extend the adapter"
    faults = [f"stages.{name}: works inside the vision encoder{why}" for name in inside]
    if None in readers:
        return faults + [
            f"stages.{name}: reads the attention of the vision encoder, which this adapter does not name; leave the "
            "stage out or extend the adapter (see `VisionReader`)"
            for name in unlisted
            if name not in inside
        ]
    known = [reader for reader in readers if reader is not None]
    depth, first = min(reader.depth for reader in known), max(reader.first for reader in known)
    return faults + _depth_faults(taps, depth, first)


def _depth_faults(taps: Sequence[tuple[str, int]], depth: int, first: int = 0) -> list[str]:
    beyond = [(name, layer) for name, layer in taps if not first <= (layer + depth if layer < 0 else layer) < depth]
    why = " after the one whose rows are merged" if first else " that exists"
    return [
        f"stages.{name}: reads vision layer {layer}{more}, expected {first} to {depth - 1}; name a layer{why}"
        for name, layer, more in _first_of_each(beyond)
    ]


def _joined_layers(config: Any) -> str:
    """The config entry that selects features of several layers of the vision encoder; "" if there is none."""
    for name in ("vision_feature_layer", "vision_feature_layers"):
        selected = getattr(config, name, None)
        if isinstance(selected, list | tuple) and len(selected) > 1:
            return f"`{name}` is {list(selected)}"
    return ""


def _first_of_each(found: Sequence[tuple[str, Any]]) -> list[tuple[str, Any, str]]:
    """The first place of each stage, with a note on how many more there are."""
    places: dict[str, list[Any]] = {}
    for name, place in found:
        places.setdefault(name, []).append(place)
    return [(name, own[0], f" and {len(own) - 1} more" if len(own) > 1 else "") for name, own in places.items()]


def _inside_layer(boundary: EncodeBoundary) -> bool:
    return isinstance(boundary, float) and boundary % 1 == 0.5
