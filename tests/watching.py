"""An observer that keeps what it is told at boundaries."""

from __future__ import annotations

from typing import Any

from tiny import policy

import dropflow
from dropflow import BoundaryEvent, Stage, hookimpl


class Watch(Stage[Any]):
    """Keeps every boundary event."""

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.events: list[BoundaryEvent] = []

    @hookimpl
    def observe(self, event: BoundaryEvent) -> None:
        self.events.append(event)


def watched(**stages: dict[str, Any]) -> dict[str, Any]:
    """A policy of these stages and a `Watch`."""
    return policy(**stages, watch={"use": Watch})


def told(flow: dropflow.Flow) -> list[BoundaryEvent]:
    """What the `Watch` of a policy saw so far."""
    return next(stage for _, stage in flow.plan.stages if isinstance(stage, Watch)).events
