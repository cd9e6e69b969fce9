"""Checks that vision does not enter after a decoder layer whose keys later layers read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dropflow.lifecycle.stage import Window
    from dropflow.policy.plan import Plan
    from dropflow.units import BackboneShape


def late_entry(shape: BackboneShape, window: Window) -> str | None:
    """What is wrong with a window in which vision enters after a layer whose keys later layers read; `None` if nothing.

    The layer that makes the keys has run on text alone, so there are none for vision.
    """
    read = [(layer, made) for layer, made in shape.producers if made < window.entry <= layer < window.exit]
    if not read:
        return None
    layer, producer = read[0]
    return (
        f"vision enters at boundary {window.entry}, but layer {layer} reads the keys of layer {producer}, which would "
        f"have none for it; enter at boundary {min(made for _, made in read)} or before"
    )


def window_faults(plan: Plan) -> list[str]:
    """Errors for a policy whose stages forecast such an entry."""
    late = late_entry(plan.shape, plan.window)
    if late is None:
        return []
    names = [name for name, forecast in plan.forecasts.items() if forecast.entry == plan.window.entry]
    return [f"stages.{name}: {late}" for name in names]
