"""Checks that stages read attention, and train through it, only where decoder layers have some."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dropflow.lifecycle.stage import Stage
    from dropflow.policy.plan import Plan


def ranking_faults(plan: Plan) -> list[str]:
    """Errors for stages that read attention, or train through it, in layers that have none."""
    shared = [fault for name, stage in plan.stages for fault in _reading_faults(plan, name, stage)]
    if plan.shape.attending is None:
        return shared
    faults = {}
    for boundary, stages in plan.prune_at.items():
        for name, stage in stages:
            read = (*stage.taps, *((boundary,) if stage.ranks else ()))
            lacking = next((layer for layer in read if not _ranked(plan, layer)), None)
            if lacking is not None and name not in faults:
                faults[name] = _unranked(plan, name, boundary, lacking)
    return [
        *faults.values(),
        *shared,
        *(fault for name, stage in plan.stages for fault in _stage_faults(plan, name, stage)),
    ]


def _reading_faults(plan: Plan, name: str, stage: Stage[Any]) -> Iterator[str]:
    """Errors for a stage that chooses what decode steps read where it could not, or would not be asked."""
    shape = plan.shape
    if stage.decode_reads_at and not hasattr(stage, "decode_cache"):
        yield f"stages.{name}: lists `decode_reads_at`, but has no `decode_cache` to choose there; define it"
    elif stage.decode_reads_at and (stage.decode_every or stage.decode_taps):
        yield (
            f"stages.{name}: chooses what decode steps read (`decode_reads_at`), for which it is asked inside them and "
            "nowhere else; leave out `decode_every` and `decode_taps`, and evict in a stage of its own"
        )
    for layer, producer in shape.producers[-1:] if stage.decode_reads_at else ():
        yield (
            f"stages.{name}: chooses what a decode step reads, but layer {layer} of this backbone reads the keys of "
            f"layer {producer} and has none to choose from; leave the stage out"
        )


def _ranked(plan: Plan, layer: int) -> bool:
    """Whether the layer, or one before it through which vision passes, has attention to rank by."""
    ranks_by = plan.shape.ranks_by(layer)
    return plan.shape.attends(layer) or (ranks_by is not None and ranks_by >= plan.window.entry)


def _unranked(plan: Plan, name: str, boundary: int, layer: int) -> str:
    entry, attending = plan.window.entry, plan.shape.attending or ()
    first = next((number for number in attending if number >= entry), None)
    told = f"stages.{name}: at boundary {boundary} it ranks by the attention of layer {layer}, but no layer from "
    if first is None:
        return f"{told}{entry} on has attention; let vision enter earlier"
    return f"{told}{entry} to {layer} has attention; rank at boundary {first + boundary - layer} or later"


def _stage_faults(plan: Plan, name: str, stage: Stage[Any]) -> Iterator[str]:
    shape = plan.shape
    reads = next((layer for layer in (*stage.decode_taps, *stage.decode_reads_at) if not shape.attends(layer)), None)
    if reads is not None:
        nearest = shape.ranks_by(reads)
        yield (
            f"stages.{name}: reads the attention of layer {reads} while decoding, which has none; name a layer that has"
            + ("" if nearest is None else f", such as {nearest}")
        )
    weighted = min(stage.prune_at, default=shape.layers) if stage.differentiable else shape.layers
    without = next((layer for layer in range(weighted, shape.layers) if not shape.attends(layer)), None)
    if without is not None:
        yield (
            f"stages.{name}: its selection trains through attention scores, which layer {without} does not have; set a "
            "hard selection in this stage"
        )
