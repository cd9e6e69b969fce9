"""Asks the stages at a boundary, checks their decisions, and combines them into one boolean over logical tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow.engine.decoder.trained import Trained, checked_loss
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.engine.tokens.prompt import Prompt
from dropflow.errors import DecisionError
from dropflow.lifecycle.payloads import Entry, Keep, PruneCall
from dropflow.lifecycle.stage import Window

if TYPE_CHECKING:
    from dropflow.lifecycle.payloads import RowAttention, States, Tapped
    from dropflow.policy.plan import Plan


@dataclass(frozen=True, eq=False)
class BoundaryState:
    """The state of a run at a boundary, before one layer."""

    boundary: int
    window: Window
    live: LiveSet
    live_mask: Bool[Tensor, "batch tokens"]
    """Live tokens by logical index, excluding padding."""
    hidden: Float[Tensor, "batch slots dim"]
    final_norm: Callable[[Tensor], Tensor] | None
    embeds: Float[Tensor, "batch tokens dim"]
    """The decoder's input embeddings."""
    training: bool = False
    """Whether the model is training, so that stages that ask for gradients get them."""
    weighted: bool = False
    """Whether soft weights of earlier boundaries apply."""
    notes: Mapping[str, Tensor] = field(default_factory=dict)
    """What stages noted at earlier boundaries of the call, by stage name."""
    returned: States | None = None
    """States that tapped layers returned, for the live tokens."""


@dataclass(frozen=True, eq=False)
class Decision:
    """The combined decision of the stages at a boundary."""

    live_mask: Bool[Tensor, "batch tokens"]
    """Tokens that stay live."""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """Scores by stage name, over the slots before the boundary."""
    keeps: dict[str, Tensor] = field(default_factory=dict)
    """Keep masks by stage name, over the same slots."""
    merge_into: Int[Tensor, "batch slots"] | None = None
    """Slot into which each slot's state is merged; `None` where no stage merges."""
    merged_by: str | None = None
    """Name of the stage that merges."""
    notes: dict[str, Tensor] = field(default_factory=dict)
    """What stages noted, by stage name."""
    log_weights: Float[Tensor, "batch tokens"] | None = None
    """Logarithm of the soft weights, 0 for tokens without one; `None` if no stage returned weights."""
    faults: tuple[tuple[Bool[Tensor, ""], DecisionError], ...] = ()
    """Pairs of a condition on the device and the error to raise if it is true."""
    losses: tuple[Float[Tensor, ""], ...] = ()
    """Terms that stages add to the loss of training."""


def decide_keeps(
    plan: Plan, trained: Trained, prompt: Prompt, state: BoundaryState, attention: RowAttention, tapped: Tapped
) -> Decision:
    """Ask every stage at a boundary, without reading anything back from the device.

    Keep masks are intersected and soft weights multiplied; text and protected tokens always stay. One stage may merge.
    """
    live, boundary = state.live, state.boundary
    call = _payload(prompt, state, attention, tapped)
    valid, image, protected = call.valid, call.image_id, call.protected
    drop = torch.zeros_like(valid)
    scores: dict[str, Tensor] = {}
    merge_into: Tensor | None = None
    merged_by: str | None = None
    keeps: dict[str, Tensor] = {}
    notes: dict[str, Tensor] = {}
    log_weights: Tensor | None = None
    faults: list[tuple[Tensor, DecisionError]] = []
    losses: list[Tensor] = []
    for name, stage in plan.prune_at[boundary]:
        asked = replace(call, differentiable=state.training and stage.differentiable, **trained.given(name))
        if stage.reads_videos and prompt.video_id is not None:
            video = torch.where(valid, live.take(prompt.video_id).to(valid.device), -1)
            asked = replace(asked, videos=video, video_count=prompt.videos)
        if prompt.carried is not None and stage.carries:
            asked = replace(asked, carried=live.take(prompt.carried[:, :, plan.carries[name]]).to(valid.device))
        answer = plan.hooks.prune(asked, stage)
        if answer is None:
            continue
        mask = _checked_keep(answer, valid, name, boundary)
        drop |= ~mask
        keeps[name] = mask
        if answer.scores is not None:
            scores[name] = answer.scores.detach()
        if answer.notes is not None:
            notes[name] = _checked_notes(answer.notes, len(valid), name, boundary)
        losses += checked_loss(answer.loss if state.training else None, name, "prune")
        if answer.merge_into is not None:
            if merge_into is not None:
                raise DecisionError(
                    f"stages.{name}: another stage already merges tokens at boundary {boundary}; let this one prune at "
                    "another boundary"
                )
            group = image if asked.videos is None else torch.where(asked.videos < 0, image, -2 - asked.videos)
            merge_into, fault = _checked_merge(answer.merge_into, mask, group, name, boundary)
            merged_by = name
            faults.append(fault)
        if answer.weights is not None and asked.differentiable:
            weighted = mask & (image >= 0) & ~protected
            faults.append(_weights_fault(answer.weights, weighted, name, boundary))
            own = torch.where(weighted, answer.weights, 1).log()
            log_weights = own if log_weights is None else log_weights + own
    drop &= (image >= 0) & ~protected
    if merge_into is not None and merged_by is not None:
        noted = log_weights is not None or state.weighted or prompt.carried is not None
        others_drop = drop & keeps[merged_by]
        faults.append(_move_fault(call, merge_into, merged_by, others_drop, noted=noted))
    index = live.index
    dropped = torch.zeros_like(state.live_mask).scatter_(1, index, drop.to(index.device))
    live_mask = prompt.without_widows(state.live_mask & ~dropped)
    if log_weights is not None:  # padding slots repeat some token's index, so they must add 0
        log_weights = log_weights.to(index.device)
        log_weights = log_weights.new_zeros(live_mask.shape).scatter_add(1, index, log_weights)
    return Decision(live_mask, scores, keeps, merge_into, merged_by, notes, log_weights, tuple(faults), tuple(losses))


def _payload(prompt: Prompt, state: BoundaryState, attention: RowAttention, tapped: Tapped) -> PruneCall:
    """The payload for the stages at the boundary, on the device of the hidden states."""
    live, device = state.live, state.hidden.device
    valid = live.take(state.live_mask)
    image = torch.where(valid, live.take(prompt.scored), -1)
    protected = live.take(prompt.protected) & valid
    slots = live.slot.gather(1, prompt.instruction_slots)
    return PruneCall(
        boundary=state.boundary,
        hidden=state.hidden,
        index=live.index.to(device),
        valid=valid.to(device),
        image_id=image.to(device),
        text=(live.take(prompt.text) & valid).to(device),
        protected=protected.to(device),
        image_sizes=prompt.image_sizes,
        instruction_slots=slots.clamp(min=0).to(device),
        instruction_valid=(prompt.instruction_valid & (slots >= 0)).to(device),
        window=state.window,
        entry=Entry(state.embeds.to(device), torch.where(prompt.present, prompt.scored, -1).to(device)),
        attention=attention,
        tapped=tapped,
        final_norm=state.final_norm,
        questions=prompt.questions,
        patches=prompt.patches.to(device),
        notes=MappingProxyType({name: noted.to(device) for name, noted in state.notes.items()}),
        returned=state.returned,
        most_text=prompt.extents["after"].high,
    )


def _checked_keep(answer: Keep, valid: Tensor, name: str, boundary: int) -> Bool[Tensor, "batch slots"]:
    """The keep mask of an answer; raises `DecisionError` for one that is of other types or shapes than asked for."""
    for said in ("mask", "scores", "weights", "notes", "merge_into"):
        given = getattr(answer, said)
        if not isinstance(given, Tensor) and (given is not None or said == "mask"):
            raise DecisionError(
                f"stages.{name}: at boundary {boundary} `prune` returned {type(given).__name__} as `{said}`, "
                "expected a tensor"
            )
    mask, scores = answer.mask, answer.scores
    if scores is not None and scores.shape != valid.shape:
        raise DecisionError(
            f"stages.{name}: at boundary {boundary} `prune` returned scores of {tuple(scores.shape)}, expected "
            f"{tuple(valid.shape)} (batch, slots)"
        )
    if mask.dtype != torch.bool or mask.shape != valid.shape:
        raise DecisionError(
            f"stages.{name}: at boundary {boundary} `prune` returned a mask of {mask.dtype} {tuple(mask.shape)}, "
            f"expected torch.bool {tuple(valid.shape)} (batch, slots)"
        )
    return mask.to(valid.device)


def _checked_notes(notes: Tensor, batch: int, name: str, boundary: int) -> Float[Tensor, "batch ..."]:
    if not notes.dim() or len(notes) != batch:
        raise DecisionError(
            f"stages.{name}: at boundary {boundary} `prune` returned notes of {tuple(notes.shape)}, expected numbers "
            f"for each of {batch} samples (batch, ...)"
        )
    return notes.detach()


def _checked_merge(
    into: Tensor, mask: Tensor, group: Tensor, name: str, boundary: int
) -> tuple[Int[Tensor, "batch slots"], tuple[Tensor, DecisionError]]:
    """Merge targets, with every token that is not a patch mapped to itself, and the error if some are invalid.

    `group` is the same for patches among which states may move: those of an image, or of a video; -1 for other tokens.
    """
    told = f"stages.{name}: at boundary {boundary} `prune` returned `merge_into`"
    if into.dtype != torch.long or into.shape != group.shape:
        raise DecisionError(
            f"{told} of {into.dtype} {tuple(into.shape)}, expected torch.int64 {tuple(group.shape)} (batch, slots)"
        )
    own = torch.arange(group.shape[1], device=group.device).expand_as(group)
    into = torch.where(group != -1, into.to(group.device), own)
    target = into.clamp(0, group.shape[1] - 1)
    fits = (target == into) & (group.gather(1, target) == group) & (mask | ~_moved(target))
    wrong = DecisionError(
        f"{told} with a token merged into no slot of its own image, or into one that is merged too and dropped; merge "
        "into patches of the same image (or, with `reads_videos`, of the same video) that stay"
    )
    return target, (~fits.all(), wrong)


def _moved(into: Int[Tensor, "batch slots"]) -> Bool[Tensor, "batch slots"]:
    """Slots whose state moves to another slot and that receive the state of another one."""
    away = into != torch.arange(into.shape[1], device=into.device)
    return away & (torch.zeros_like(into).scatter_add(1, into, away.long()) > 0)


def _move_fault(
    call: PruneCall, into: Tensor, name: str, others_drop: Tensor, *, noted: bool
) -> tuple[Tensor, DecisionError]:
    """The error if a merge moves kept tokens although something else refers to the slots they leave or take.

    `others_drop` are the slots that other stages drop; `noted` says whether tokens have soft weights or carried
    numbers.
    """
    spoken_of = call.protected | others_drop | noted
    wrong = DecisionError(
        f"stages.{name}: at boundary {call.boundary} `prune` moves kept tokens (`merge_into`), but protected tokens, "
        "soft weights, numbers carried from `encode` and another stage's drops at this boundary refer to their old "
        "slots; let the other stage act elsewhere, or move no tokens"
    )
    return (_moved(into) & spoken_of.any(1, keepdim=True)).any(), wrong


def _weights_fault(weights: Tensor, weighted: Tensor, name: str, boundary: int) -> tuple[Tensor, DecisionError]:
    """Check that soft weights are one float per slot, positive and finite for the visual tokens the stage keeps."""
    told = f"stages.{name}: at boundary {boundary} `prune` returned weights"
    if not weights.is_floating_point() or weights.shape != weighted.shape:
        raise DecisionError(
            f"{told} of {weights.dtype} {tuple(weights.shape)}, expected a float dtype and {tuple(weighted.shape)} "
            "(batch, slots)"
        )
    own = weights.detach()
    fits = (torch.isfinite(own) & (own > 0)) | ~weighted
    wrong = DecisionError(f"{told} that are not positive and finite for every visual token it keeps; give 1 to these")
    return ~fits.all(), wrong
