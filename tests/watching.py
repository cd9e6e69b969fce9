"""Stages that keep what they are told: an observer of boundaries, and a reader of attention rows."""

from __future__ import annotations

from typing import Any

from tiny import policy
from torch import Tensor

import dropflow
from dropflow import BoundaryEvent, PruneCall, Stage, hookimpl


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


def rows_at(boundary: int) -> type[Stage[Any]]:
    """A stage that keeps the last instruction token's attention rows (batch, heads, keys) in `rows`, at a boundary."""

    class Rows(Stage[Any]):
        prune_at = (boundary,)
        rows: Tensor

        @hookimpl
        def prune(self, call: PruneCall) -> None:
            self.rows = call.attention_rows(boundary, call.instruction_slots)[:, :, -1]

    return Rows
