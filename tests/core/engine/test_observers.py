"""Observers see the encoder, the boundaries and the caches; without observers, no event is created."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import HIDROP, policy, prompt

import dropflow
from dropflow import BoundaryEvent, CacheEvent, EncodeEvent, Stage, hookimpl

MIXED = {
    "merge": {"use": "mustdrop/spatial-merge", "at": 1, "window": [2, 2], "budget": 10},
    "keys": {"use": "mustdrop/key-set", "share": 0.2},
    "pyramid": {"use": "hidrop/concave-pyramid", "keep": {2: 6}},
    "exit": {"use": "hidrop/early-exit", "at": 4},
    "cache": {"use": "mustdrop/output-aware-cache", "at": 1},
}
TOKENS = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}


class Watch(Stage[Any]):
    """Keeps every event."""

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.events: list[Any] = []

    @hookimpl
    def observe_encode(self, event: EncodeEvent) -> None:
        self.events.append(event)

    @hookimpl
    def observe(self, event: BoundaryEvent) -> None:
        self.events.append(event)

    @hookimpl
    def observe_cache(self, event: CacheEvent) -> None:
        self.events.append(event)


@torch.no_grad()
def watched(model: Any, **stages: dict[str, Any]) -> list[Any]:
    with dropflow.attach(model, policy(**stages, watch={"use": Watch})) as flow:
        model.generate(**prompt([(3, "I", 5)]), **TOKENS)
        watch: Any = dict(flow.plan.stages)["watch"]
    events: list[Any] = watch.events
    return events


def test_events_come_in_the_order_of_the_call(llava: Any) -> None:
    events = watched(llava, **MIXED)
    kinds = [type(event).__name__.removesuffix("Event") for event in events]
    assert kinds == ["Encode", "Boundary", "Boundary", "Boundary", "Cache", "Cache", "Cache"]
    encode, start, prune, leave, *caches = events
    assert [(step.stage, step.boundary) for step in encode.steps] == [("merge", 1), ("keys", None)]
    assert [layout.grid for layout in encode.layouts] == [(4, 4)]
    assert [len(step.before[0]) for step in encode.steps] == [16, 10]
    assert [step.protected[0].sum().item() for step in encode.steps] == [0, 2]
    assert [(e.boundary, e.stages, e.window_edge_by) for e in (start, prune, leave)] == [
        (0, (), ()),
        (2, ("pyramid",), ()),
        (4, (), ("exit",)),
    ]
    assert int(prune.keeps["pyramid"].sum()) == 6
    assert prune.index.shape == prune.scores["pyramid"].shape == prune.keeps["pyramid"].shape == (1, 19)
    assert [event.step for event in caches] == [0, 1, 2]
    assert [(e.stage, e.layer, int((~e.kept).sum())) for e in caches[0].evictions] == [("cache", 1, 4)]
    held = [[int(view.valid.sum()) for view in event.layers] for event in caches]
    assert held == [[n + more for n in (19, 15, 15, 15, 9, 9)] for more in range(3)]


def test_a_policy_without_encode_stages_tells_of_the_images_too(llava: Any) -> None:
    encode, *_ = watched(llava, **HIDROP["stages"])
    assert (encode.modality, encode.steps, [layout.tokens for layout in encode.layouts]) == ("image", (), [16])


@torch.no_grad()
def test_without_observers_no_event_is_made_and_nothing_is_told(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an event was created without observers")

    for name in (
        "decoder.prompt_run.BoundaryEvent",
        "decoder.cache_stages.CacheEvent",
        "decoder.cache_stages.cache_views",
        "decoder.decide_cache.Eviction",
        "vision.vision_run.EncodeStep",
        "vision.encoding.EncodeEvent",
    ):
        monkeypatch.setattr(f"dropflow.engine.{name}", refuse)
    with dropflow.attach(llava, policy(**MIXED)) as flow:
        llava.generate(**prompt([(3, "I", 5)]), **TOKENS)
        assert flow.report().layers[2].visual_tokens == 6
