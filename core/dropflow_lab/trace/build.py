"""Converts the events of observers to plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from dropflow import BoundaryEvent, CacheEvent, EncodeEvent, EncodeStep, Policy, Report
from dropflow_lab.errors import InputError
from dropflow_lab.trace.replay import original_of
from dropflow_lab.trace.schema import (
    EncodedImage,
    Merge,
    Pruning,
    Scores,
    TracedBoundary,
    TracedCall,
    TracedEncode,
    TracedEviction,
    TracedImage,
    TracedLayer,
    TracedRead,
    TracedRun,
)

if TYPE_CHECKING:
    from dropflow_lab.trace.recorder import Recorder


def traced_images(first: BoundaryEvent, encoded: Sequence[EncodeEvent]) -> list[TracedImage]:
    """Return the images of the prompt of one sample whose first event is given, by number."""
    image, patches = first.prompt.image_id[0], first.prompt.scored[0]
    layouts = [layout for event in sorted(encoded, key=lambda event: event.modality) for layout in event.layouts]
    count = int(image.max()) + 1
    grids = [layout.grid for layout in layouts] if len(layouts) == count else [None] * count
    return [
        TracedImage(
            index=(patches == number).nonzero()[:, 0].tolist(),
            extra=((image == number) & (patches < 0)).nonzero()[:, 0].tolist(),
            grid=grids[number],
        )
        for number in range(count)
    ]


def traced_videos(encoded: Sequence[EncodeEvent]) -> list[list[int]]:
    """Return the frames of each video among the images of a prompt, in the order of time."""
    found, first = [], 0
    for event in sorted(encoded, key=lambda event: event.modality):
        found += [[first + frame for frame in video] for video in event.videos]
        first += len(event.layouts)
    return found


def traced_run(
    policy: Policy,
    report: Report,
    recorder: Recorder,
    images: Sequence[TracedImage],
    tokens: Sequence[tuple[int, str]],
    answer: str,
) -> TracedRun:
    """Return one run; `tokens` are the generated ones, each with its text."""
    first, data = recorder.boundaries[0], original_of(policy) or policy.to_dict()
    layers = _layers(recorder.boundaries, [layer.flops for layer in report.layers])
    return TracedRun(
        name=policy.name,
        policy=json.loads(json.dumps(data)),
        positions=policy.positions,
        entry=first.window.entry,
        exit=first.window.exit,
        entered_by=_turned_by(recorder.boundaries, first.window.entry),
        exited_by=_turned_by(recorder.boundaries, first.window.exit),
        keep_asking=any(layer.visual_tokens for layer in layers[first.window.exit :]),
        encode=_encode(recorder.encoded),
        boundaries=[_boundary(event, images) for event in recorder.boundaries if event.keeps],
        layers=layers,
        calls=[
            TracedCall(
                step=event.step,
                token=token,
                text=text,
                kv_entries=held,
                evicted=_evicted(event),
                read=_read(event, first.prompt.visual[0]),
            )
            for event, held, (token, text) in zip(recorder.caches, recorder.held, tokens, strict=True)
        ],
        answer=answer,
    )


def _turned_by(events: Sequence[BoundaryEvent], boundary: int) -> list[str]:
    return [name for event in events if event.boundary == boundary for name in event.window_edge_by]


def _encode(events: Sequence[EncodeEvent]) -> list[TracedEncode]:
    deciding = [event for event in events if event.steps]
    if len(deciding) > 1:
        raise InputError(
            "trace: `encode` stages were asked in several calls of the vision encoder (pictures and videos in one "
            "prompt?); trace a prompt with one kind of images"
        )
    return [
        TracedEncode(
            stage=step.stage,
            boundary=step.boundary,
            shift=0 if step.boundary is None else event.prefix,
            proportional=step.answer.proportional,
            images=[_encoded(step, image, event.videos) for image in range(len(step.places))],
        )
        for event in deciding
        for step in event.steps
    ]


def _encoded(step: EncodeStep, image: int, videos: Sequence[Sequence[int]]) -> EncodedImage:
    before, places, answer = step.before[image].tolist(), step.places[image].tolist(), step.answer
    merged: list[Merge] | None = []
    sizes: list[float] | None = None
    if answer.rows is not None:
        frames = next((own for own in videos if image in own and answer.across_frames), (image,))
        old = [(patch, frame) for frame in frames for patch in step.before[frame].tolist()]
        merged = None if answer.shares is None else _merges(answer.shares()[image], image, old, places)
        sizes = [1.0] * len(places) if answer.sizes is None else exactly(answer.sizes[image])
    scores: Scores | None = None
    if answer.scores is not None:
        scores = [None] * (max(before, default=-1) + 1)
        for patch, score in zip(before, rounded(answer.scores()[image]), strict=True):
            scores[patch] = score
    protected = step.places[image][step.protected[image]].tolist()
    return EncodedImage(kept=places, merged=merged, sizes=sizes, protected=protected, scores=scores)


def _merges(shares: Tensor, image: int, before: Sequence[tuple[int, int]], places: Sequence[int]) -> list[Merge]:
    """Return the rows of an image that are not just those of their own patch.

    `shares` is (new rows, old rows and prefix rows); `before` are the patch and the image of each old row.
    """
    found = []
    for place, row in zip(places, shares.detach().to("cpu", torch.float32), strict=True):
        used = row.nonzero()[:, 0].tolist()
        old, prefix = [before[i] for i in used if i < len(before)], [i - len(before) for i in used if i >= len(before)]
        weights = exactly(row[used])
        if old == [(place, image)] and not prefix and weights == [1.0]:
            continue
        of, images = [patch for patch, _ in old], _elsewhere(old, image)
        plain = all(math.isclose(weight, 1 / len(used), rel_tol=1e-5) for weight in weights)
        found.append(Merge(into=place, of=of, images=images, prefix=prefix, shares=None if plain else weights))
    return found


def _elsewhere(old: Sequence[tuple[int, int]], image: int) -> list[int]:
    """Return the image of each row, or nothing if all are of `image`."""
    return [own for _, own in old] if any(own != image for _, own in old) else []


def _boundary(event: BoundaryEvent, images: Sequence[TracedImage]) -> TracedBoundary:
    live, index = event.live[0], event.index[0]
    shown = torch.zeros_like(live).scatter(0, index, True)  # live before the stages' decision
    shielded = event.prompt.protected[0]
    by = []
    for name, keep in event.keeps.items():
        lost = torch.zeros_like(live).scatter(0, index, ~keep[0]) & shown & ~shielded
        scores = event.scores.get(name)
        ranked = None
        if scores is not None:
            known = torch.full(live.shape, torch.nan).scatter(0, index.cpu(), scores[0].detach().float().cpu())
            ranked = [rounded(known[image.index]) for image in images]
        by.append(Pruning(stage=name, dropped=_patches(lost, images), scores=ranked))
    merged = [] if event.merged_into is None else _clusters(event.merged_into[0], images)
    return TracedBoundary(
        boundary=event.boundary, kept=_patches(live, images), by=by, merged=merged, merged_by=event.merged_by
    )


def _clusters(merged_into: Tensor, images: Sequence[TracedImage]) -> list[list[Merge]]:
    """Per image, its states that others were merged into; `merged_into` are logical indices, one per token."""
    patch = {token: (number, n) for n, image in enumerate(images) for number, token in enumerate(image.index)}
    members: list[dict[int, list[tuple[int, int]]]] = [{} for _ in images]
    for n, image in enumerate(images):
        for number, into in enumerate(merged_into[image.index].tolist()):
            place, home = patch[into]
            members[home].setdefault(place, []).append((number, n))
    return [
        [
            Merge(into=into, of=[p for p, _ in of], images=_elsewhere(of, image))
            for into, of in own.items()
            if of != [(into, image)]
        ]
        for image, own in enumerate(members)
    ]


def _patches(tokens: Tensor, images: Iterable[TracedImage]) -> list[list[int]]:
    """Per image, its patches among `tokens`, a boolean over the prompt."""
    return [tokens[image.index].nonzero()[:, 0].tolist() for image in images]


def _layers(events: Sequence[BoundaryEvent], flops: Sequence[float]) -> list[TracedLayer]:
    """Count the tokens before each layer, by the live sets of the events."""
    layers = []
    for number, work in enumerate(flops):
        event = [event for event in events if event.boundary <= number][-1]
        visual = int((event.live[0] & event.prompt.visual[0]).sum())
        layers.append(TracedLayer(visual_tokens=visual, kv_entries=int(event.live[0].sum()), flops=work))
    return layers


def _evicted(event: CacheEvent) -> list[TracedEviction]:
    """Return the evictions; layers that lost the same entries share one, unless the stage recorded notes."""
    found: dict[tuple[Any, ...], list[int]] = {}
    notes: dict[tuple[Any, ...], Scores] = {}
    for eviction in event.evictions:
        gone = ~eviction.kept[0]
        tokens = tuple(eviction.index[0][gone].tolist())
        if not tokens:
            continue
        key: tuple[Any, ...] = (eviction.stage, tokens)
        if eviction.notes is not None:
            key += (eviction.layer,)
            notes[key] = rounded(eviction.notes[0][gone])
        found.setdefault(key, []).append(eviction.layer)
    return [
        TracedEviction(stage=key[0], layers=layers, tokens=list(key[1]), notes=notes.get(key))
        for key, layers in found.items()
    ]


def _read(event: CacheEvent, visual: Bool[Tensor, "tokens"]) -> list[TracedRead]:
    """Return what was read by layers that did not read all; layers that read the same share one."""
    found: dict[tuple[int, ...], list[int]] = {}
    entries = {}
    for layer, tokens in event.read.items():
        own = tuple((tokens[0, : len(visual)] & visual.to(tokens.device)).nonzero()[:, 0].tolist())
        found.setdefault(own, []).append(layer)
        entries[own] = int(tokens[0].sum())
    return [
        TracedRead(stages=list(event.read_by), layers=layers, tokens=list(own), entries=entries[own])
        for own, layers in found.items()
    ]


def exactly(values: Tensor) -> list[float]:
    """Return numbers with enough digits to restore float32 values bit for bit."""
    return [float(f"{value:.9g}") for value in values.detach().float().tolist()]


def rounded(values: Tensor) -> Scores:
    """Return numbers with six significant digits, `None` for those that are not finite."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.detach().float().tolist()]
