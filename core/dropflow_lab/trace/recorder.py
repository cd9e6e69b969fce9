"""The stage that watches one run of a policy through the engine's observer hooks."""

from __future__ import annotations

from dataclasses import replace

from dropflow import BoundaryEvent, CacheEvent, EncodeEvent, Policy, Stage, StageContext, StageOptions, hookimpl
from dropflow.policy.policy import StageUse

NAME = "(trace)"
"""Name of the recorder among the stages of a watched policy."""


class Recorder(Stage[StageOptions]):
    """Records the events of all calls while it is attached."""

    def __init__(self, options: StageOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self.encoded: list[EncodeEvent] = []
        self.boundaries: list[BoundaryEvent] = []
        self.caches: list[CacheEvent] = []
        """Without their `layers`, which would hold every cache's index once per generated token."""
        self.held: list[list[int]] = []
        """Entries of each layer's cache after each call."""

    @hookimpl
    def observe_encode(self, event: EncodeEvent) -> None:
        """Record what was decided about the images."""
        self.encoded.append(event)

    @hookimpl
    def observe(self, event: BoundaryEvent) -> None:
        """Record what was applied at a boundary."""
        self.boundaries.append(event)

    @hookimpl
    def observe_cache(self, event: CacheEvent) -> None:
        """Record what was evicted from the caches, and how much they hold."""
        self.caches.append(replace(event, layers=()))
        self.held.append([int(view.valid[0].sum()) for view in event.layers])


def watched(policy: Policy) -> Policy:
    """Return the policy with a `Recorder` after its stages, which changes nothing."""
    return replace(policy, stages={**policy.stages, NAME: StageUse("trace/recorder", Recorder, StageOptions())})
