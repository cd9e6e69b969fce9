"""Checks that cache contents while decoding are the same for a sample alone, and the same when repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dropflow.engine.attach.flow import Flow
from dropflow.lifecycle.cache_payloads import CacheView
from dropflow.testing.case import BATCH, BUDGET, ISOLATION, Case
from dropflow.testing.probes import HeldEntries

WATCH = "watched-by-the-kit"
"""Name of the stage with which the kit observes the others."""
MOST = 24
"""Maximum number of tokens generated to have a stage asked twice while decoding."""
Held = list[list[list[int]]]
"""The logical tokens that a sample's cache holds, by step and layer, and after them those that were read."""


@torch.no_grad()
def check_decoding(case: Case) -> None:
    """Check that `decode_cache` stages keep the same entries of a sample alone, in the batch, and when repeated.

    Nothing is checked for policies without such stages, nor for samples without images, which run dense.
    """
    left = case.padded_left()
    watched = {**case.policy, "stages": {**case.policy["stages"], WATCH: {"use": HeldEntries}}}
    with left.attach(watched) as flow:
        stages = [stage for _, stage in flow.plan.hooks.implementers("decode_cache")]
        if not stages:
            return
        count = min(max(4, 1 + 2 * max(stage.decode_every for stage in stages)), MOST)
        budget = {**BUDGET, "max_new_tokens": count, "min_new_tokens": count}
        tokens, held = _generate(left, flow, left.inputs, budget)
        again, held_again = _generate(left, flow, left.inputs, budget)
        for sample, own in enumerate(left.real):
            difference = _difference(held[sample], held_again[sample])
            if difference or not torch.equal(tokens[sample], again[sample]):
                raise left.broken(
                    ISOLATION,
                    f"a second, equal generation gives sample {sample} {difference or 'other tokens'}; a stage keeps "
                    "state between calls: check what `decode_cache` reads, and keep such data in `CacheKeep.memory`",
                )
            if not left.drawn[1][sample]:
                continue
            alone, held_alone = _generate(left, flow, left.single(sample), budget)
            difference = _difference(held[sample], held_alone[0])
            if difference or not torch.equal(alone[0, int(own.sum()) :], tokens[sample, len(own) :]):
                raise left.broken(
                    BATCH,
                    f"while decoding, sample {sample} has {difference or 'other tokens'} alone than in the batch; "
                    "check what `decode_cache` computes over the batch, including padding",
                )


def _generate(
    left: Case, flow: Flow, inputs: Mapping[str, Any], budget: Mapping[str, Any]
) -> tuple[Tensor, Sequence[Held]]:
    """Generated ids, and which tokens each sample's caches held, numbered without padding."""
    watch: Any = dict(flow.plan.stages)[WATCH]
    watch.layers, watch.read = [], []
    tokens: Tensor = left.model.generate(**inputs, **budget)
    pads = (~inputs["attention_mask"].bool()).sum(1).tolist()

    def told(sample: int, views: Sequence[CacheView], read: Mapping[int, Tensor]) -> list[list[int]]:
        seen = [
            view.valid & read[view.layer].gather(1, view.index) if view.layer in read else view.valid for view in views
        ]
        masks = [*((view, view.valid) for view in views), *zip(views, seen, strict=True)]
        return [(view.index[sample, mask[sample]] - pads[sample]).tolist() for view, mask in masks]

    calls = list(zip(watch.layers, watch.read, strict=True))
    held = [[told(sample, views, read) for views, read in calls] for sample in range(len(pads))]
    return tokens, held


def _difference(first: Held, second: Held) -> str:
    """A description of where two runs hold different tokens; "" if they hold the same."""
    for step, (one, other) in enumerate(zip(first, second, strict=True)):
        layers = len(one) // 2
        for layer, (held, found) in enumerate(zip(one, other, strict=True)):
            if held != found and layer < layers:
                return f"other entries in the cache of layer {layer} after step {step}"
            if held != found:
                return f"read other entries in layer {layer - layers} in step {step}"
    return ""
