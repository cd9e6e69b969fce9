"""Asks the stages, checks their decisions, and turns them into one boolean over logical tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dropflow.attention import QueryKey
from dropflow.errors import DecisionError
from dropflow.keys import PADDING, KeyIndex
from dropflow.payloads import CacheCall, CacheView, Keep, PruneCall, WindowCall
from dropflow.prompt import Prompt
from dropflow.stage import Stage, Window

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from dropflow.backbone import Backbone
    from dropflow.plan import Plan
    from dropflow.run import Run


def decide_window(plan: Plan, backbone: Backbone, prompt: Prompt) -> Window:
    """Where vision enters (the last of the `inject` answers) and exits (the first of the `exit` answers)."""
    call = WindowCall(backbone, (prompt.present & prompt.visual).sum(1), prompt.text.sum(1))
    layers = plan.shape.layers
    entry = max(_boundaries(plan.hooks.inject(call), "inject", layers), default=0)
    return Window(entry, min(_boundaries(plan.hooks.exit(call), "exit", layers), default=layers))


def _boundaries(answers: Iterator[tuple[str, int]], hook: str, layers: int) -> Iterator[int]:
    for name, boundary in answers:
        if not 0 <= boundary <= layers:
            raise DecisionError(f"stages.{name}: `{hook}` answered {boundary}, expected a boundary from 0 to {layers}")
        yield boundary


def decide_keeps(
    run: Run, boundary: int, hidden: Tensor, stages: Sequence[tuple[str, Stage[Any]]], ask: Callable[[], QueryKey]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Ask every stage of a boundary; returns the tokens that stay live (batch, tokens) and the scores by stage.

    Keeps intersect; text and protected tokens stay in any case.
    """
    prompt, live = run.prompt, run.live
    assert prompt is not None
    valid = live.take(run.want)
    image = torch.where(valid, live.take(prompt.scored), -1)
    protected = live.take(prompt.protected) & valid
    slots = live.slot.gather(1, prompt.queries)
    seen: list[QueryKey] = []

    def rows(layer: int, wanted: Tensor) -> Tensor:
        def once() -> QueryKey:
            if not seen:
                seen.append(ask())
            return seen[0]

        return run.attention_rows(layer, wanted, once if layer == boundary else None)

    call = PruneCall(
        boundary=boundary,
        hidden=hidden,
        index=live.index,
        valid=valid,
        image=image,
        protected=protected,
        image_sizes=prompt.image_sizes,
        queries=slots.clamp(min=0),
        query_valid=prompt.query_valid & (slots >= 0),
        window=run.window,
        attention=rows,
    )
    drop = torch.zeros_like(valid)
    scores: dict[str, Tensor] = {}
    for name, stage in stages:
        answer = run.plan.hooks.prune(call, stage)
        if answer is not None:
            _check_keep(answer, valid, name, boundary)
            drop |= ~answer.mask
            if answer.scores is not None:
                scores[name] = answer.scores
    drop &= (image >= 0) & ~protected
    dropped = torch.zeros_like(run.want).scatter_(1, live.index, drop)
    return prompt.without_widows(run.want & ~dropped), scores


def _check_keep(answer: Keep, valid: Tensor, name: str, boundary: int) -> None:
    mask = answer.mask
    if mask.dtype != torch.bool or mask.shape != valid.shape:
        raise DecisionError(
            f"stages.{name}: at boundary {boundary} `prune` returned a mask of {mask.dtype} {tuple(mask.shape)}, "
            f"expected torch.bool {tuple(valid.shape)} (batch, slots)"
        )


def decide_cache(run: Run, cache: Cache, stages: Sequence[Stage[Any]]) -> None:
    """Ask the cache stages one after the other, each seeing what the one before has left."""
    names = {id(stage): name for name, stage in run.plan.stages}
    batch, device = run.embeds.shape[0], run.embeds.device
    for stage in stages:
        views = tuple(_view(number, layer.known(batch, device)) for number, layer in enumerate(cache.layers))
        answer = run.plan.hooks.decode_cache(CacheCall(run.step, views, run.attention_rows), stage)
        for number, keep in (answer.keep if answer is not None else {}).items():
            view = views[number] if 0 <= number < len(views) else None
            if view is None or keep.dtype != torch.bool or keep.shape != view.valid.shape:
                expected = f"a layer from 0 to {len(views) - 1}" if view is None else f"bool {tuple(view.valid.shape)}"
                raise DecisionError(
                    f"stages.{names[id(stage)]}: `decode_cache` answered {keep.dtype} {tuple(keep.shape)} for layer "
                    f"{number}, expected {expected}"
                )
            cache.layers[number].evict((keep | (view.image < 0)) & view.valid)


def _view(number: int, index: KeyIndex) -> CacheView:
    valid = index.image != PADDING
    if index.valid is not None:
        valid &= index.valid
    return CacheView(number, index.logical, valid, torch.where(valid, index.image, -1))
