"""Checks that the numbers of a trace file refer to things that exist, which readers of a trace rely on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dropflow_lab.trace.schema import Trace, TracedBoundary, TracedRun

_LARGEST_GRID = 4
"""Most cells of a grid per patch that is a token; a backbone may leave cells out."""


def prompt_faults(trace: Trace) -> list[str]:
    """Return faults of the prompt: tokens outside it or in two images, grids that do not fit, frames not there."""
    faults, taken = [], set[int]()
    for n, image in enumerate(trace.prompt.images):
        where, own = f"prompt.images.{n}", [*image.index, *image.extra]
        if max(own, default=-1) >= trace.prompt.tokens:
            faults.append(f"{where}: token {max(own)}, expected tokens below {trace.prompt.tokens}")
        before = len(taken)
        taken.update(own)
        if len(taken) != before + len(own):
            faults.append(f"{where}: expected every token once, in one image")
        patches = len(image.index)
        if image.grid is not None and not patches <= image.grid[0] * image.grid[1] <= _LARGEST_GRID * patches:
            faults.append(f"{where}.grid: {image.grid[0]} x {image.grid[1]} for {patches} patches")
    frames = [frame for video in trace.prompt.videos for frame in video]
    if len(set(frames)) < len(frames) or max(frames, default=-1) >= len(trace.prompt.images):
        faults.append("prompt.videos: expected every frame once, among the images")
    return faults


def bounds_faults(trace: Trace, run: TracedRun, path: str) -> list[str]:
    """Return faults of a run: lists of the wrong length, and boundaries, patches, layers and tokens out of range."""
    return list(_run_faults(trace, run, path))


def _run_faults(trace: Trace, run: TracedRun, path: str) -> Iterator[str]:
    depth, sizes = trace.depth, [len(image.index) for image in trace.prompt.images]
    if not run.name.isprintable():
        yield f"{path}.name: expected a name that can be printed, got {run.name!r}"
    if not isinstance(run.policy.get("stages", {}), dict):
        yield f"{path}.policy.stages: expected a mapping of stages"
    if len(run.layers) != depth:
        yield f"{path}.layers: {len(run.layers)} entries for {depth} layers"
    if run.entry > depth or run.exit > depth:
        yield f"{path}: entry {run.entry} and exit {run.exit}, expected boundaries from 0 to {depth}"
    yield from _encode_faults(run, sizes, path)
    last = -1
    for n, boundary in enumerate(run.boundaries):
        if not last < boundary.boundary <= depth:
            yield f"{path}.boundaries.{n}: expected boundaries up to {depth} that ascend, got {boundary.boundary}"
        last = boundary.boundary
        yield from _boundary_faults(boundary, sizes, f"{path}.boundaries.{n}")
    yield from _call_faults(run, depth, trace.prompt.tokens, path)


def _encode_faults(run: TracedRun, sizes: Sequence[int], path: str) -> Iterator[str]:
    for n, step in enumerate(run.encode):
        where = f"{path}.encode.{n}"
        if len(step.images) != len(sizes):
            yield f"{where}.images: {len(step.images)} entries for {len(sizes)} images"
        elif any(max(merge.images, default=0) >= len(sizes) for own in step.images for merge in own.merged or ()):
            yield f"{where}.images: a row is made of rows of an image that is not there"
        elif step.shift > min(sizes, default=0):
            yield f"{where}.shift: {step.shift}, but an image has {min(sizes, default=0)} patches"
        for i, image in enumerate(step.images):
            if image.sizes is not None and len(image.sizes) != len(image.kept):
                yield f"{where}.images.{i}.sizes: {len(image.sizes)} entries for {len(image.kept)} rows"


def _boundary_faults(boundary: TracedBoundary, sizes: Sequence[int], path: str) -> Iterator[str]:
    yield from _patch_faults(boundary.kept, sizes, f"{path}.kept")
    for n, pruning in enumerate(boundary.by):
        yield from _patch_faults(pruning.dropped, sizes, f"{path}.by.{n}.dropped")
        if pruning.scores is not None and len(pruning.scores) != len(sizes):
            yield f"{path}.by.{n}.scores: {len(pruning.scores)} entries for {len(sizes)} images"
    if boundary.merged:
        merged: list[list[int]] = [[merge.into for merge in merges] for merges in boundary.merged]
        for own, merges in enumerate(boundary.merged):
            for patch, image in (source for merge in merges for source in merge.sources(own)):
                if image >= len(sizes):
                    yield f"{path}.merged.{own}: image {image}, but there are {len(sizes)}"
                elif image < len(merged):
                    merged[image].append(patch)
        yield from _patch_faults(merged, sizes, f"{path}.merged")


def _patch_faults(patches: Sequence[Sequence[int]], sizes: Sequence[int], path: str) -> Iterator[str]:
    if len(patches) != len(sizes):
        yield f"{path}: {len(patches)} entries for {len(sizes)} images"
    for i, (own, size) in enumerate(zip(patches, sizes, strict=False)):
        if max(own, default=-1) >= size:
            yield f"{path}.{i}: patch {max(own)}, but the image has {size} patches"


def _call_faults(run: TracedRun, depth: int, tokens: int, path: str) -> Iterator[str]:
    for n, call in enumerate(run.calls):
        if call.step != n:
            yield f"{path}.calls.{n}.step: expected {n}, got {call.step}"
        told = {f"evicted.{k}": eviction for k, eviction in enumerate(call.evicted)}
        for name, part in (told | {f"read.{k}": read for k, read in enumerate(call.read)}).items():
            where = f"{path}.calls.{n}.{name}"
            if max(part.layers, default=-1) >= depth:
                yield f"{where}.layers: layer {max(part.layers)} of {depth}"
            if max(part.tokens, default=-1) >= tokens:
                yield f"{where}.tokens: token {max(part.tokens)}, but the prompt has {tokens}"
        for k, eviction in enumerate(call.evicted):
            where = f"{path}.calls.{n}.evicted.{k}"
            if eviction.notes is not None and len(eviction.notes) != len(eviction.tokens):
                yield f"{where}.notes: {len(eviction.notes)} entries for {len(eviction.tokens)} tokens"
