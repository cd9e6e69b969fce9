"""Asks the stages, checks their decisions, and turns them into one boolean over logical tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow.engine.tokens.cache_index import PADDING, PROTECTED, KeyIndex
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.engine.tokens.prompt import Prompt
from dropflow.errors import DecisionError
from dropflow.lifecycle.cache_payloads import CacheCall, CacheView
from dropflow.lifecycle.events import Eviction
from dropflow.lifecycle.payloads import Entry, Exit, Keep, PruneCall, RowAttention, Tapped, WindowCall
from dropflow.lifecycle.stage import Stage, Window

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from dropflow.backbone.backbone import Backbone
    from dropflow.policy.plan import Plan


@dataclass(frozen=True)
class WindowDecision:
    """Where vision enters (the last of the `inject` answers) and exits (the first of the `exit` answers)."""

    window: Window
    keep_answer_sources: bool
    """Whether visual tokens that an answer is predicted from outlive the exit."""
    by: dict[int, tuple[str, ...]]
    """The stages that answered so, for these two boundaries."""


def decide_window(plan: Plan, backbone: Backbone, prompt: Prompt) -> WindowDecision:
    """Ask the `inject` and `exit` stages."""
    call = WindowCall(backbone, (prompt.present & prompt.visual).sum(1), prompt.text.sum(1))
    layers = plan.shape.layers
    entries = _boundaries(plan.hooks.inject(call), "inject", layers)
    answered = {name: one if isinstance(one, Exit) else Exit(one) for name, one in plan.hooks.exit(call)}
    exits = _boundaries(((name, one.boundary) for name, one in answered.items()), "exit", layers)
    window = Window(max(entries.values(), default=0), min(exits.values(), default=layers))
    by = {
        boundary: tuple(name for name, answer in answers.items() if answer == boundary)
        for boundary, answers in ((window.entry, entries), (window.exit, exits))
    }
    return WindowDecision(
        window, any(answered[name].keep_answer_sources for name in by[window.exit] if name in exits), by
    )


def _boundaries(answers: Iterator[tuple[str, int]], hook: str, layers: int) -> dict[str, int]:
    found = dict(answers)
    for name, boundary in found.items():
        if not 0 <= boundary <= layers:
            raise DecisionError(f"stages.{name}: `{hook}` answered {boundary}, expected a boundary from 0 to {layers}")
    return found


@dataclass(frozen=True, eq=False)
class BoundaryState:
    """Where a run stands: in front of one layer, with these tokens live."""

    boundary: int
    window: Window
    live: LiveSet
    live_mask: Bool[Tensor, "batch tokens"]
    """Live tokens by logical index, padding excluded."""
    hidden: Float[Tensor, "batch slots dim"]
    final_norm: Callable[[Tensor], Tensor] | None
    embeds: Float[Tensor, "batch tokens dim"]
    """What entered the decoder."""
    training: bool = False
    """Whether the model trains, so that stages that ask for gradients get them."""


@dataclass(frozen=True, eq=False)
class Decision:
    """What the stages of a boundary decided together."""

    live_mask: Bool[Tensor, "batch tokens"]
    """Tokens that stay live."""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """By stage name, over the slots in front of the boundary."""
    keeps: dict[str, Tensor] = field(default_factory=dict)
    """What each stage answered, by its name, over the same slots."""
    merge_into: Int[Tensor, "batch slots"] | None = None
    """Slot that each slot's state is merged into; `None` where no stage merges."""
    merged_by: str | None = None
    """Name of the stage that merges."""
    log_weights: Float[Tensor, "batch tokens"] | None = None
    """Logarithm of the soft weights, 0 where there is none; `None` where no stage gave any."""


def decide_keeps(
    plan: Plan, prompt: Prompt, standing: BoundaryState, attention: RowAttention, tapped: Tapped
) -> Decision:
    """Ask every stage of a boundary.

    Keeps intersect, soft weights multiply; text and protected tokens stay in any case. One stage may merge.
    """
    live, boundary = standing.live, standing.boundary
    call = _payload(prompt, standing, attention, tapped)
    valid, image, protected = call.valid, call.image_id, call.protected
    drop = torch.zeros_like(valid)
    scores: dict[str, Tensor] = {}
    merge_into: Tensor | None = None
    merged_by: str | None = None
    keeps: dict[str, Tensor] = {}
    log_weights: Tensor | None = None
    for name, stage in plan.prune_at[boundary]:
        asked = replace(call, differentiable=standing.training and stage.differentiable)
        if prompt.carried is not None and stage.carries:
            asked = replace(asked, carried=live.take(prompt.carried[:, :, plan.carries[name]]))
        answer = plan.hooks.prune(asked, stage)
        if answer is None:
            continue
        _check_keep(answer, valid, name, boundary)
        drop |= ~answer.mask
        keeps[name] = answer.mask
        if answer.scores is not None:
            scores[name] = answer.scores.detach()
        if answer.merge_into is not None:
            if merge_into is not None:
                raise DecisionError(
                    f"stages.{name}: a stage before it merges tokens at boundary {boundary} already; let it prune at "
                    "another boundary"
                )
            merge_into, merged_by = _checked_merge(answer.merge_into, image, name, boundary), name
        if answer.weights is not None and asked.differentiable:
            weighted = answer.mask & (image >= 0) & ~protected
            _check_weights(answer.weights, weighted, name, boundary)
            own = torch.where(weighted, answer.weights, 1).log()
            log_weights = own if log_weights is None else log_weights + own
    drop &= (image >= 0) & ~protected
    dropped = torch.zeros_like(standing.live_mask).scatter_(1, live.index, drop)
    live_mask = prompt.without_widows(standing.live_mask & ~dropped)
    if log_weights is not None:  # padding slots repeat the index of some token, and add 0 to it
        log_weights = log_weights.new_zeros(live_mask.shape).scatter_add(1, live.index, log_weights)
    return Decision(live_mask, scores, keeps, merge_into, merged_by, log_weights)


def _payload(prompt: Prompt, standing: BoundaryState, attention: RowAttention, tapped: Tapped) -> PruneCall:
    """What every stage of the boundary is told."""
    live = standing.live
    valid = live.take(standing.live_mask)
    image = torch.where(valid, live.take(prompt.scored), -1)
    protected = live.take(prompt.protected) & valid
    slots = live.slot.gather(1, prompt.instruction_slots)
    return PruneCall(
        boundary=standing.boundary,
        hidden=standing.hidden,
        index=live.index,
        valid=valid,
        image_id=image,
        text=live.take(prompt.text) & valid,
        protected=protected,
        image_sizes=prompt.image_sizes,
        instruction_slots=slots.clamp(min=0),
        instruction_valid=prompt.instruction_valid & (slots >= 0),
        window=standing.window,
        entry=Entry(standing.embeds, torch.where(prompt.present, prompt.scored, -1)),
        attention=attention,
        tapped=tapped,
        final_norm=standing.final_norm,
        questions=prompt.questions,
    )


def _checked_merge(into: Tensor, image: Tensor, name: str, boundary: int) -> Int[Tensor, "batch slots"]:
    """Targets of a merge, with every token that is no patch left to itself."""
    told = f"stages.{name}: at boundary {boundary} `prune` returned `merge_into`"
    if into.dtype != torch.long or into.shape != image.shape:
        raise DecisionError(
            f"{told} of {into.dtype} {tuple(into.shape)}, expected torch.int64 {tuple(image.shape)} (batch, slots)"
        )
    own = torch.arange(image.shape[1], device=image.device).expand_as(image)
    into = torch.where(image >= 0, into, own)
    target = into.clamp(0, image.shape[1] - 1)
    if not bool(((target == into) & (image.gather(1, target) == image) & (into.gather(1, target) == target)).all()):
        raise DecisionError(f"{told} with a token merged into no slot of its own image, or into one that is merged too")
    return into


def _check_weights(weights: Tensor, weighted: Tensor, name: str, boundary: int) -> None:
    """Soft weights are one float per slot, positive and finite for the visual tokens that the stage keeps."""
    told = f"stages.{name}: at boundary {boundary} `prune` returned weights"
    if not weights.is_floating_point() or weights.shape != weighted.shape:
        raise DecisionError(
            f"{told} of {weights.dtype} {tuple(weights.shape)}, expected a float dtype and {tuple(weighted.shape)} "
            "(batch, slots)"
        )
    own = weights.detach()[weighted]
    if not bool((torch.isfinite(own) & (own > 0)).all()):
        raise DecisionError(f"{told} that are not positive and finite for every visual token it keeps; give 1 to these")


def _check_keep(answer: Keep, valid: Tensor, name: str, boundary: int) -> None:
    mask = answer.mask
    if mask.dtype != torch.bool or mask.shape != valid.shape:
        raise DecisionError(
            f"stages.{name}: at boundary {boundary} `prune` returned a mask of {mask.dtype} {tuple(mask.shape)}, "
            f"expected torch.bool {tuple(valid.shape)} (batch, slots)"
        )


def decide_cache(
    plan: Plan,
    stages: Sequence[Stage[Any]],
    cache: Cache,
    step: int,
    tokens: int,
    attention: RowAttention,
    told: list[Eviction] | None = None,
) -> None:
    """Ask the cache stages one after the other, each seeing what the one before has left.

    With a list in `told`, what they decided is appended to it.
    """
    names = {id(stage): name for name, stage in plan.stages}
    for stage in stages:
        name = names[id(stage)]
        views = cache_views(cache, name)
        answer = plan.hooks.decode_cache(CacheCall(step, tokens, views, attention), stage)
        if answer is None:
            continue
        for number, notes in answer.memory.items():
            _check_entries(notes, None, number, views, name)
            cache.layers[number].remember(name, notes)
        made: dict[tuple[int, int], tuple[LiveSet, KeyIndex]] = {}
        for number, keep in answer.keep.items():
            _check_entries(keep, torch.bool, number, views, name)
            view, layer = views[number], cache.layers[number]
            same = (id(view.index), id(keep))  # layers that held the same and keep the same go on sharing their index
            if same not in made:
                kept = LiveSet.of((keep | (view.image_id < 0) | view.protected) & view.valid)
                made[same] = (kept, layer.full_index().compacted(kept))
            if told is not None:
                stays = (keep | (view.image_id < 0) | view.protected) & view.valid
                told.append(Eviction(name, number, view.index, stays, answer.memory.get(number)))
            layer.evict(*made[same])


def _check_entries(
    answer: Tensor, dtype: torch.dtype | None, number: int, views: Sequence[CacheView], name: str
) -> None:
    """An answer about a layer's cache has one value per entry."""
    view = views[number] if 0 <= number < len(views) else None
    if view is None or answer.shape != view.valid.shape or answer.dtype != (dtype or answer.dtype):
        kind = dtype or "numbers"
        expected = f"a layer from 0 to {len(views) - 1}" if view is None else f"{kind} {tuple(view.valid.shape)}"
        raise DecisionError(
            f"stages.{name}: `decode_cache` answered {answer.dtype} {tuple(answer.shape)} for layer {number}, "
            f"expected {expected}"
        )


def cache_views(cache: Cache, stage: str = "") -> tuple[CacheView, ...]:
    """What each layer's cache holds, with the notes of `stage`."""
    return tuple(_view(number, layer.full_index(), layer.recall(stage)) for number, layer in enumerate(cache.layers))


def _view(number: int, index: KeyIndex, memory: Tensor | None) -> CacheView:
    valid = index.image_id != PADDING
    if index.valid is not None:
        valid &= index.valid
    protected = valid & (index.image_id >= PROTECTED)
    image = torch.where(valid, index.image_id - protected * PROTECTED, -1)
    return CacheView(number, index.logical, valid, image, protected, memory)
