"""What if a patch had stayed, or gone: edited copies of a trace, to be replayed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

from dropflow_lab.errors import InputError
from dropflow_lab.trace.schema import Trace, TracedRun

EDIT = "edit"
"""Name of the stage that drops a patch where no stage of the policy pruned."""


def read_patches(text: str, option: str) -> tuple[int, list[int], int | None]:
    """Image, patches and boundary of `[IMAGE/]PATCH[,PATCH...][@BOUNDARY]`; raises `InputError` naming `option`."""
    found = re.fullmatch(r"(?:(\d+)/)?(\d+(?:,\d+)*)(?:@(\d+))?", text.replace(" ", ""))
    if found is None or (found[3] and option == "--keep"):
        boundary = "" if option == "--keep" else ", and @BOUNDARY behind them"
        raise InputError(f"{option}: expected patches such as 17,18, or 1/17 for image 1{boundary}; got {text!r}")
    return int(found[1] or 0), [int(patch) for patch in found[2].split(",")], int(found[3]) if found[3] else None


def keep_patches(trace: Trace, patches: Sequence[int], image: int = 0, run: int = 0) -> Trace:
    """A copy in which `patches` of one image stay as long as vision does, in the caches, too.

    Patches are counted row by row from 0. Raises `InputError` for a patch that is not there, or that was merged into
    another one, so that there is no row to keep.
    """
    indices = _indices(trace, patches, image)
    for patch in patches:
        _check_not_merged(trace.runs[run], patch, image)

    def step(data: dict[str, Any], shift: int) -> None:
        own = data["images"][image]
        own["kept"] = sorted({*own["kept"], *(patch - shift for patch in patches if patch >= shift)})

    def boundary(data: dict[str, Any]) -> None:
        data["kept"][image] = sorted({*data["kept"][image], *patches})
        for pruning in data["by"]:
            pruning["dropped"][image] = [p for p in pruning["dropped"][image] if p not in patches]

    def eviction(data: dict[str, Any]) -> None:
        stays = [n for n, token in enumerate(data["tokens"]) if token not in indices]
        data["tokens"] = [data["tokens"][n] for n in stays]
        if data["notes"] is not None:
            data["notes"] = [data["notes"][n] for n in stays]

    return _edited(trace, run, step, boundary, eviction)


def drop_patches(trace: Trace, patches: Sequence[int], image: int = 0, run: int = 0, at: int | None = None) -> Trace:
    """A copy in which `patches` of one image are gone from boundary `at` on, by default as soon as vision enters.

    Raises `InputError` for a patch that is not there or is protected, and for a boundary outside the traced window.
    """
    _indices(trace, patches, image)
    traced = trace.runs[run]
    at = traced.entry if at is None else at
    if not traced.entry <= at < traced.exit:
        raise InputError(
            f"boundary {at}: vision is live from boundary {traced.entry} to before {traced.exit}; drop patches inside"
        )
    lost = sorted(set(patches) & set(trace.protected(traced)[image]))
    if lost:
        raise InputError(f"patch {lost[0]}: an encode stage protects it, so that it cannot be dropped")
    data = traced.model_dump()
    if at not in [boundary.boundary for boundary in traced.boundaries]:
        data["boundaries"] = sorted([*data["boundaries"], _new(trace, traced, at)], key=lambda each: each["boundary"])
    for boundary in data["boundaries"]:
        if boundary["boundary"] >= at:
            boundary["kept"][image] = [p for p in boundary["kept"][image] if p not in patches]
    return _with_run(trace, run, data)


def _new(trace: Trace, run: TracedRun, at: int) -> dict[str, Any]:
    """A boundary that drops nothing yet."""
    earlier = [boundary.kept for boundary in run.boundaries if boundary.boundary < at]
    kept = earlier[-1] if earlier else trace.entering(run)
    dropped: list[list[int]] = [[] for _ in kept]
    return {"boundary": at, "kept": [list(own) for own in kept], "by": [{"stage": EDIT, "dropped": dropped}]}


def _indices(trace: Trace, patches: Sequence[int], image: int) -> set[int]:
    images = trace.prompt.images
    if not 0 <= image < len(images):
        raise InputError(f"image {image}: the trace has images 0 to {len(images) - 1}")
    for patch in patches:
        if not 0 <= patch < len(images[image].index):
            raise InputError(f"patch {patch}: image {image} has patches 0 to {len(images[image].index) - 1}")
    return {images[image].index[patch] for patch in patches}


def _check_not_merged(run: TracedRun, patch: int, image: int) -> None:
    for step in run.encode:
        own = step.images[image]
        if patch - step.shift in own.kept or patch < step.shift:
            continue
        for merge in own.merged or ():
            if patch - step.shift in merge.of:
                raise InputError(
                    f"patch {patch}: the stage {step.stage!r} merged it into patch {merge.into + step.shift}, so that "
                    "there is no row of its own to keep; keep that one"
                )


def _edited(
    trace: Trace,
    run: int,
    step: Callable[[dict[str, Any], int], None],
    boundary: Callable[[dict[str, Any]], None],
    eviction: Callable[[dict[str, Any]], None],
) -> Trace:
    data = trace.runs[run].model_dump()
    for each in data["encode"]:
        step(each, each["shift"])
    for each in data["boundaries"]:
        boundary(each)
    for call in data["calls"]:
        for each in call["evicted"]:
            eviction(each)
        call["evicted"] = [each for each in call["evicted"] if each["tokens"]]
    return _with_run(trace, run, data)


def _with_run(trace: Trace, run: int, data: dict[str, Any]) -> Trace:
    try:
        changed = TracedRun.model_validate(data)
        return Trace(
            **{name: getattr(trace, name) for name in ("format", "model", "depth", "prompt")},
            runs=[changed if number == run else own for number, own in enumerate(trace.runs)],
        )
    except ValidationError as error:
        raise InputError("; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())) from None
