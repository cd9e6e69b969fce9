"""Stages of the conformance kit, which together use every way in which tokens can enter and leave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dropflow.lifecycle.cache_payloads import CacheView
from dropflow.lifecycle.events import BoundaryEvent, CacheEvent, EncodeEvent, EncodeStep
from dropflow.lifecycle.hooks import hookimpl
from dropflow.lifecycle.payloads import Encode, EncodeCall, Keep, PruneCall, WindowCall
from dropflow.lifecycle.stage import Stage
from dropflow.operators.selection import keep_top
from dropflow.units import Budget


class Enter(Stage[Any]):
    """Vision enters at boundary 1."""

    @hookimpl
    def inject(self, call: WindowCall) -> int:  # noqa: ARG002
        """Boundary 1."""
        return 1


class Leave(Stage[Any]):
    """Visual tokens exit before the last layer."""

    @hookimpl
    def exit(self, call: WindowCall) -> int:
        """The boundary before the last layer."""
        return call.backbone.shape.layers - 1


class Ranked(Stage[Any]):
    """Keeps the patches of each image that the prompt's last token attends to most: half, then a third of those."""

    shares: tuple[float, ...] = (0.5, 0.17)

    @property
    def prune_at(self) -> tuple[int, ...]:
        """Two middle boundaries."""
        depth = self.context.scale.target.layers
        return (depth // 3, depth * 2 // 3)

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        """Keep the best-ranked patches of each image."""
        rows = call.attention_rows(call.boundary, call.instruction_slots).mean(1)
        weight = call.instruction_valid.to(rows.dtype)[:, :, None]
        scores = (rows * weight).sum(1)[:, -call.index.shape[1] :]
        budget = Budget(share=self.shares[self.prune_at.index(call.boundary)])
        return Keep(keep_top(scores, call.image_id, call.counts(budget)), scores)


class Ranks(Stage[Any]):
    """Records the attention rows of the instruction tokens before every layer with attention, and decides nothing."""

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.rows: dict[int, Tensor] = {}
        """Rows (batch, heads, rows, slots) of the instruction tokens that exist, 0 for others, by layer."""

    @property
    def prune_at(self) -> tuple[int, ...]:
        """All layers with attention."""
        return tuple(self.context.scale.target.with_attention)

    @hookimpl
    def prune(self, call: PruneCall) -> None:
        """Ask for the rows."""
        rows = call.attention_rows(call.boundary, call.instruction_slots)
        self.rows[call.boundary] = rows * call.instruction_valid.to(rows.dtype)[:, None, :, None]


class KeepAll(Ranked):
    """Ranks everything and drops nothing, in the vision encoder's output and in the decoder."""

    shares = (1.0, 1.0)

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Keep every row."""
        return Encode(keep=tuple(torch.ones_like(places, dtype=torch.bool) for places in call.places))


class EveryThird(Stage[Any]):
    """Drops every third row of each image's features before the decoder, and protects the first row."""

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Drop and protect by place."""
        keep = tuple(places % 3 != 1 for places in call.places)
        kept = (places[own] for places, own in zip(call.places, keep, strict=True))
        return Encode(keep=keep, protect=tuple(places == 0 for places in kept))


class Inside(EveryThird):
    """Drops and protects the same rows before the vision encoder's second layer."""

    @property
    def encode_at(self) -> tuple[int | None, ...]:
        """Boundary 1 of the vision encoder."""
        return (1,)


class LeaveOut(Stage[Any]):
    """Leaves every third unit of each image out of a packed vision tower, and every fourth before its second block.

    It records its own steps in the last call of the tower.
    """

    encode_at = ("pixels", 1)

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.steps: tuple[EncodeStep, ...] = ()

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Drop by place."""
        every, which = (3, 1) if call.boundary == "pixels" else (4, 2)
        return Encode(keep=tuple(places % every != which for places in call.places))

    @hookimpl
    def observe_encode(self, event: EncodeEvent) -> None:
        """Record the steps."""
        self.steps = tuple(step for step in event.steps if step.stage == self.context.name)


class Witness(Stage[Any]):
    """Records what the engine tells stages about the images, and decides nothing."""

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.grids: list[tuple[int, int] | None] = []
        self.sizes: list[int] = []
        self.videos: list[tuple[int, ...]] | None = []
        self.images: Tensor | None = None
        self.index: Tensor | None = None

    @property
    def prune_at(self) -> tuple[int, ...]:
        """The first boundary."""
        return (0,)

    @property
    def ranks(self) -> bool:
        """False: it reads no attention."""
        return False

    @hookimpl
    def encode(self, call: EncodeCall) -> None:
        """Record the grid and the number of rows of each image, and the frames of each video."""
        first = len(self.grids)
        if call.videos is None:
            self.videos = None
        elif self.videos is not None:
            self.videos += [tuple(first + frame for frame in video) for video in call.videos]
        self.grids += call.grids
        self.sizes += [len(places) for places in call.places]

    @hookimpl
    def prune(self, call: PruneCall) -> None:
        """Record the image to which each token's patch belongs."""
        self.images, self.index = call.image_id, call.index


class RanksByNumbers(Stage[Any]):
    """Records which stages have ranked a patch by NaN, and decides nothing."""

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.faults: list[tuple[str, int]] = []
        """Name of each such stage and the boundary."""
        self._live: Tensor | None = None
        """Tokens that were live after the previous boundary."""

    @hookimpl
    def observe(self, event: BoundaryEvent) -> None:
        """Check all scores at one boundary."""
        before = self._live
        if before is None or event.boundary <= event.window.entry:
            before = event.prompt.present
        patches = ((event.prompt.scored >= 0) & before).gather(1, event.index)  # padding slots may name dropped tokens
        self._live = event.live
        for name, scores in event.scores.items():
            if bool((scores.isnan() & patches).any()):
                self.faults.append((name, event.boundary))


class HeldEntries(Stage[Any]):
    """Records what the caches hold after every call, and decides nothing."""

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.layers: list[tuple[CacheView, ...]] = []
        """Views of all layers' caches, one tuple per call."""
        self.read: list[Mapping[int, Tensor]] = []
        """Layer -> logical tokens that it read, for layers that did not read all; one mapping per call."""

    @hookimpl
    def observe_cache(self, event: CacheEvent) -> None:
        """Record the views of one call."""
        self.layers.append(event.layers)
        self.read.append(event.read)


def policy(**stages: Mapping[str, Any]) -> dict[str, Any]:
    """A policy of these stages."""
    return {"name": "conformance", "stages": stages}


def use(stage: type[Stage[Any]]) -> dict[str, Any]:
    """A policy entry."""
    return {"use": stage}


WINDOW = policy(enter=use(Enter), rank=use(Ranked), leave=use(Leave))
"""Late entry, two prunings, early exit."""
RAGGED = policy(encode=use(EveryThird), rank=use(Ranked))
"""Rows dropped from the features and in the decoder, so that samples of a batch hold different numbers of tokens."""
INSIDE = policy(inside=use(Inside), rank=use(Ranked))
"""The same with rows dropped inside the vision encoder, for adapters that state where its layers are."""
UNITS = policy(units=use(LeaveOut), rank=use(Ranked))
"""Units left out of a packed tower before it and before its second block, for adapters that state `packed_tower`."""
EVERYTHING = policy(keep=use(KeepAll))
"""A stage that acts everywhere but drops nothing."""
