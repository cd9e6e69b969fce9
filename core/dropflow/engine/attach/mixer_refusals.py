"""Refuses decoder layers that no policy can serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dropflow.errors import UnsupportedModel

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone


def check_mixers(backbone: Backbone) -> None:
    """Raise `UnsupportedModel` for a decoder with a layer whose tokens mix in a way that dropping one would change."""
    mixers = backbone.mixers
    shared = [number for number, mixer in enumerate(mixers) if mixer.kind == "shared"]
    if shared:
        raise UnsupportedModel(
            f"text decoder: {len(shared)} layers share keys with other layers, so layers cannot hold different tokens; "
            "no policy can be attached to this model"
        )
    other = {mixer.name: number for number, mixer in reversed(list(enumerate(mixers))) if mixer.kind == "other"}
    for name, number in other.items():
        raise UnsupportedModel(
            f"text decoder: layer {number} is of kind {name!r}, of which dropflow does not know what dropping a token "
            "changes; no policy can be attached to this model"
        )
    if all(mixer.kind != "attention" for mixer in mixers):
        raise UnsupportedModel(
            "text decoder: none of its layers has attention; no policy can be attached to this model"
        )
