"""Refuses to recall visual tokens of earlier turns where the result would not be that of the definition."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.tokens.host import read
from dropflow.errors import UnsupportedCall

if TYPE_CHECKING:
    from torch import Tensor

    from dropflow.backbone.backbone import Backbone
    from dropflow.engine.decoder.parked import Parked
    from dropflow.engine.decoder.site import Site
    from dropflow.policy.plan import Plan


def recall_faults(backbone: Backbone, plan: Plan) -> list[str]:
    """Why a policy with `recall: true` cannot be attached to this model; empty where it can."""
    faults = []
    if not plan.prune_at:
        faults.append("recall: no stage prunes in the LLM, so every question sees the same tokens; leave it out")
    if plan.policy.positions == "compact":
        faults.append(
            "recall: tokens that come back would need the positions of a sequence from which others were dropped; use "
            "`positions: persistent`"
        )
    faults += [
        f"recall: stages.{name} evicts entries that a later question might recall; leave the stage or `recall` out"
        for name, stage in plan.hooks.implementers("decode_cache")
        if not stage.decode_reads_at
    ]
    other = next((number for number, one in enumerate(backbone.mixers) if one.name != "full_attention"), None)
    if other is not None:
        faults.append(
            f"recall: layer {other} is of kind {backbone.mixers[other].name!r}, and tokens can come back only in "
            "layers with full attention; leave it out for this model"
        )
    return faults


def check_recall(site: Site, parked: Parked, batch: int, replayed: object) -> None:
    """Refuse a later turn whose attention, gradients or number of samples cannot take tokens back.

    `replayed` are the keeps that the caller states, which cannot say what a later turn chooses.
    """
    if site.flash:
        raise UnsupportedCall(
            f"recall: {site.implementation} takes no mask, and tokens that come back stand among earlier text; load "
            "the model with 'sdpa' or 'eager', or set `recall: false`"
        )
    if site.training:
        raise UnsupportedCall("recall: no gradients flow through parked tokens; train on whole prompts")
    if replayed is not None:
        raise UnsupportedCall(
            "replay: keeps are those of one prompt, and this turn chooses anew; leave the turn out of the block, or "
            "set `recall: false`"
        )
    held = len(parked.logical)
    if held != batch:
        raise UnsupportedCall(
            f"{CACHE_ARGUMENT}: holds {held} samples, and the call has {batch}, as with beams or several returned "
            "sequences; repeat the cache's samples by its `batch_repeat_interleave`, or pick by `batch_select_indices`"
        )


def check_more_images(parked: Parked, visual: Tensor) -> None:
    """Refuse a call in which some samples bring images, where `visual` (batch, tokens) is true, and others recall.

    Alone, the others would choose anew among their parked tokens. One host synchronisation.
    """
    there = parked.valid
    ((mixed,),) = [[0]] if len(there) != len(visual) else read((there.any(1) & ~visual.any(1).to(there.device)).any())
    if mixed:
        raise UnsupportedCall(
            "recall: in this call some samples bring images, which ends their choice among earlier ones, and others "
            "would choose anew; run them in calls of their own, or set `recall: false`"
        )
