"""Stages that put new rows into the encoder say of which old ones these are sums, and only if somebody asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import policy, prompt, tiny_llava

import dropflow
from dropflow import EncodeCall, EncodeEvent, Stage, hookimpl
from dropflow.policy import registry
from dropflow.testing import stage_entry
from dropflow_tome import TokenMerging

VARIANTS: dict[str, dict[str, Any]] = {
    "sizes of members": {"use": "tome/token-merging", "r": 5, "layers": 3},
    "no contextual tokens": {"use": "visionzip/dominant-contextual", "dominant": 4, "contextual": 0},
    "outliers alone": {"use": "prumerge/prune-merge", "variant": "prumerge", "ratio": 0.3, "neighbours": 3},
    "every patch stays": {"use": "prumerge/prune-merge", "ratio": 1.0},
    "windows in place": {"use": "mustdrop/spatial-merge", "window": (2, 2), "budget": 9, "order": "raster"},
    "odd windows": {"use": "control/pool", "window": (3, 2)},
}


class Look(Stage[Any]):
    """Before another stage, keeps what that one will see."""

    encode_at = (0.5, 1, 1.5, 2.5, "features", None)

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.seen: dict[Any, EncodeCall] = {}
        self.events: list[EncodeEvent] = []

    @hookimpl
    def encode(self, call: EncodeCall) -> None:
        self.seen[call.boundary] = call

    @hookimpl
    def observe_encode(self, event: EncodeEvent) -> None:
        self.events.append(event)


def told(model: Any, stage: dict[str, Any]) -> int:
    """Rows that are sums of those before, by the stage's own word; fails where they are not."""
    look, counted = {"use": Look}, 0
    with torch.no_grad(), dropflow.attach(model.train(), policy(look=look, stage=stage)) as flow:
        model.eval().get_image_features(prompt([("I", 2, "I", 4)])["pixel_values"])
        watch: Any = dict(flow.plan.stages)["look"]
    for step in watch.events[0].steps:
        call, answer = watch.seen[step.boundary], step.answer
        if answer.rows is None:
            continue
        assert answer.shares is not None, "a stage that makes rows has to say from which"
        for rows, shares, *before in zip(answer.rows, answer.shares(), call.features, call.prefix_rows, strict=True):
            whole = torch.cat(before)[: shares.shape[1]]
            torch.testing.assert_close(shares @ whole, rows, rtol=1e-5, atol=1e-5)
            counted += len(rows)
    return counted


NEED_CLS = ("outliers alone", "every patch stays")


@pytest.mark.parametrize(
    ("variant", "tower"),
    [(name, tower) for name in VARIANTS for tower in ("clip", "siglip") if tower == "clip" or name not in NEED_CLS],
)
def test_rows_are_the_sums_that_a_stage_says(variant: str, tower: str) -> None:
    assert told(tiny_llava(tower=tower), VARIANTS[variant])


STAGES = [name for name in registry.names(registry.STAGES) if "units" not in registry.load(registry.STAGES, name).needs]
"""All but those that need a packed tower, which LLaVA is not; they leave units out and make no rows."""


@pytest.mark.parametrize("name", STAGES)
def test_no_shipped_stage_makes_rows_without_a_case_above(name: str, llava: Any) -> None:
    assert not told(llava, stage_entry(name)[1]) or name in {stage["use"] for stage in VARIANTS.values()}


def test_nothing_is_told_where_nobody_asks(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dropflow_tome import matching

    asked: list[int] = []
    monkeypatch.setattr(matching, "shares", lambda *_: asked.append(1))
    stage = {"use": TokenMerging, "r": 2, "layers": 2}
    with torch.no_grad(), dropflow.attach(llava, policy(tome=stage)):
        llava(**prompt())
    assert not asked
