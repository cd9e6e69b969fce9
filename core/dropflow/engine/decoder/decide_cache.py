"""Asks the cache stages, checks their decisions, and evicts entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dropflow.engine.tokens.cache import flow_layers
from dropflow.engine.tokens.cache_index import PADDING, PROTECTED, KeyIndex
from dropflow.engine.tokens.host import Extent, read
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.errors import DecisionError
from dropflow.lifecycle.cache_payloads import CacheCall, CacheKeep, CacheView
from dropflow.lifecycle.events import Eviction
from dropflow.lifecycle.stage import Stage

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from dropflow.lifecycle.payloads import RowAttention
    from dropflow.policy.plan import Plan


def decide_cache(
    plan: Plan,
    stages: Sequence[Stage[Any]],
    cache: Cache,
    step: int,
    tokens: int,
    attention: RowAttention,
    told: list[Eviction] | None = None,
) -> None:
    """Ask the cache stages one after the other; each sees what the one before has kept.

    If `told` is a list, their decisions are appended to it.
    """
    names = {id(stage): name for name, stage in plan.stages}
    left: dict[int, LiveSet] = {}
    for stage in stages:
        name = names[id(stage)]
        layers = flow_layers(cache)
        full = _full_indices(layers)
        views = _views(full, {number: layer.recall(name) for number, layer in layers.items()})
        seen = next(iter(full.values()))
        answer = plan.hooks.decode_cache(
            CacheCall(
                step, tokens, seen.length, seen.images, tuple(views.values()), _of_entries(attention, dict(left))
            ),
            stage,
        )
        if answer is None:
            continue
        if not isinstance(answer, CacheKeep):
            raise DecisionError(
                f"stages.{name}: `decode_cache` answered {type(answer).__name__} after a forward, expected `CacheKeep` "
                "or `None`; to choose what a step reads, list a layer in `decode_reads_at`"
            )
        for said in ("keep", "memory"):
            if not isinstance(getattr(answer, said), Mapping):
                raise DecisionError(
                    f"stages.{name}: `decode_cache` answered {type(getattr(answer, said)).__name__} as `{said}`, "
                    "expected a mapping from layers to tensors"
                )
        for number, notes in answer.memory.items():
            _check_entries(notes, None, number, views, name)
            layers[number].remember(name, notes)
        stays = {}
        for number, keep in answer.keep.items():
            _check_entries(keep, torch.bool, number, views, name)
            view = views[number]
            stays[number] = (keep.to(view.valid.device) | (view.image_id < 0) | view.protected) & view.valid
            if told is not None:
                told.append(Eviction(name, number, view.index, stays[number], answer.memory.get(number)))
        for number, kept in _evict(layers, full, views, stays).items():
            before = left.get(number)
            left[number] = kept if before is None else before.restricted(kept)


def _of_entries(attention: RowAttention, left: Mapping[int, LiveSet]) -> RowAttention:
    """`attention`, computed over the entries as the layers ran, reduced to those that are `left`; 0 for padding."""

    def rows(layer: int, tokens: Tensor) -> Tensor:
        found = attention(layer, tokens)
        if layer not in left:
            return found
        kept = left[layer]
        index = kept.index.to(found.device)[:, None, None].expand(*found.shape[:3], -1)
        taken = found.gather(3, index)
        return taken if kept.valid is None else taken * kept.valid.to(taken.device)[:, None, None]

    return rows


def _evict(
    layers: Mapping[int, Any], full: Mapping[int, KeyIndex], views: Mapping[int, CacheView], stays: Mapping[int, Tensor]
) -> dict[int, LiveSet]:
    """Evict the entries that are not kept; layers that hold the same before and after share one index in both cases.

    A layer that keeps everything is left alone; what the others keep is returned. One host synchronisation for all
    layers.
    """
    numbers = list(stays)
    if not numbers:
        return {}
    before = {number: other for other, number in pairwise(numbers) if full[other] is full[number]}
    as_before, all_stay, *counts = read(
        torch.stack(
            [
                (stays[number] == stays[before[number]]).all() if number in before else stays[number].new_zeros(())
                for number in numbers
            ]
        ),
        torch.stack([(stays[number] == views[number].valid).all() for number in numbers]),
        *(stays[number].sum(1) for number in numbers),
    )
    made: dict[int, tuple[LiveSet, KeyIndex]] = {}
    for number, same, everything, count in zip(numbers, as_before, all_stay, counts, strict=True):
        if everything:
            continue
        if same:
            made[number] = made[before[number]]
        else:
            kept = LiveSet.of(stays[number], Extent.of(count))
            made[number] = kept, full[number].compacted(kept)
        layers[number].evict(*made[number])
    return {number: kept for number, (kept, _) in made.items()}


def _check_entries(
    answer: Tensor, dtype: torch.dtype | None, number: int, views: Mapping[int, CacheView], name: str
) -> None:
    """Check that an answer about a layer's cache has one value per entry."""
    view = views.get(number)
    if not isinstance(answer, Tensor):
        raise DecisionError(
            f"stages.{name}: `decode_cache` answered {type(answer).__name__} for layer {number}, expected a tensor"
        )
    if view is None or answer.shape != view.valid.shape or answer.dtype != (dtype or answer.dtype):
        kind = dtype or "numbers"
        known = list(views)
        layers = f"from 0 to {len(known) - 1}" if known == list(range(len(known))) else f"of {known}"
        expected = f"a layer {layers}" if view is None else f"{kind} {tuple(view.valid.shape)}"
        raise DecisionError(
            f"stages.{name}: `decode_cache` answered {answer.dtype} {tuple(answer.shape)} for layer {number}, "
            f"expected {expected}"
        )


def cache_views(cache: Cache) -> tuple[CacheView, ...]:
    """Views of what the cache of each layer with attention holds."""
    full = _full_indices(flow_layers(cache))
    return tuple(_views(full, {}).values())


def cache_view(number: int, index: KeyIndex) -> CacheView:
    """A view of what the cache of layer `number` holds, the tokens of its full `index`."""
    valid = index.image_id != PADDING
    if index.valid is not None:
        valid &= index.valid
    protected = valid & (index.image_id >= PROTECTED)
    image = torch.where(valid, index.image_id - protected * PROTECTED, -1)
    return CacheView(number, index.logical, valid, image, protected, number, None)


def _full_indices(layers: Mapping[int, Any]) -> dict[int, KeyIndex]:
    """The full index of each layer's cache; layers that share an index share the full one."""
    made: dict[tuple[KeyIndex, int], KeyIndex] = {}
    found = {}
    for number, layer in layers.items():
        index = layer.index
        if index is None:
            found[number] = layer.full_index()
        else:
            key = (index, layer.length)
            if key not in made:
                made[key] = layer.full_index()
            found[number] = made[key]
    return found


def _views(full: Mapping[int, KeyIndex], memories: Mapping[int, Tensor | None]) -> dict[int, CacheView]:
    """Views of all layers' caches; layers that share an index share the tensors computed from it."""
    made: dict[KeyIndex, CacheView] = {}
    found = {}
    for number, index in full.items():
        if index not in made:
            made[index] = cache_view(number, index)
        found[number] = replace(made[index], layer=number, memory=memories.get(number))
    return found
