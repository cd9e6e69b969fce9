"""Edited copies of a trace for replay: what if a patch had been kept, or dropped?"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from dropflow_lab.errors import InputError
from dropflow_lab.trace.follow import follow, follow_on, moves
from dropflow_lab.trace.schema import EncodedImage, Merge, Trace, TracedRun

EDIT = "edit"
"""Name of the stage that drops a patch at a boundary where no stage of the policy pruned."""


def read_patches(text: str, option: str) -> tuple[int, list[int], int | None]:
    """Image, patches and boundary of `[IMAGE/]PATCH[,PATCH...][@BOUNDARY]`; raises `InputError` naming `option`."""
    found = re.fullmatch(r"(?:(\d+)/)?(\d+(?:,\d+)*)(?:@(\d+))?", text.replace(" ", ""))
    if found is None or (found[3] and option == "--keep"):
        boundary = "" if option == "--keep" else ", and @BOUNDARY after them"
        raise InputError(f"{option}: expected patches such as 17,18, or 1/17 for image 1{boundary}; got {text!r}")
    return int(found[1] or 0), [int(patch) for patch in found[2].split(",")], int(found[3]) if found[3] else None


def keep_patches(trace: Trace, patches: Sequence[int], image: int = 0, run: int = 0) -> Trace:
    """Return a copy in which `patches` of one image are kept as long as vision is live, in the caches as well.

    Patches are counted row by row from 0. If the vision encoder merged a patch, the merged token is kept; a patch
    merged inside the LLM is kept as its own token. Raises `InputError` for a patch that does not exist.
    """
    _check_there(trace, patches, image)
    traced = trace.runs[run]
    data = traced.model_dump()
    places = {
        _kept_by_encoder(data["encode"], len(trace.prompt.images[image].index), patch, image) for patch in patches
    }
    tokens = {trace.prompt.images[image].index[place] for place in places}
    for boundary in data["boundaries"]:
        boundary["kept"][image] = sorted({*boundary["kept"][image], *places})
        _leave_merges(boundary, image, places)
        for pruning in boundary["by"]:
            pruning["dropped"][image] = [p for p in pruning["dropped"][image] if p not in places]
    for call in data["calls"]:
        for eviction in call["evicted"]:
            stays = [n for n, token in enumerate(eviction["tokens"]) if token not in tokens]
            eviction["tokens"] = [eviction["tokens"][n] for n in stays]
            if eviction["notes"] is not None:
                eviction["notes"] = [eviction["notes"][n] for n in stays]
        call["evicted"] = [each for each in call["evicted"] if each["tokens"]]
        for read in call["read"]:
            read["tokens"] = sorted({*read["tokens"], *tokens})
    return _with_run(trace, run, data)


def drop_patches(trace: Trace, patches: Sequence[int], image: int = 0, run: int = 0, at: int | None = None) -> Trace:
    """Return a copy in which `patches` of one image are dropped at boundary `at`, by default where vision enters.

    If a patch was merged, the merged token is dropped. Raises `InputError` for a patch that does not exist or is
    protected, for a boundary outside the traced window, and where no patch is left to drop.
    """
    _check_there(trace, patches, image)
    traced = trace.runs[run]
    at = traced.entry if at is None else at
    if not traced.entry <= at < traced.exit:
        raise InputError(
            f"boundary {at}: vision is live from boundary {traced.entry} to before {traced.exit}; drop patches inside"
        )
    standing = follow(trace, traced, image).entering
    for boundary in traced.boundaries:
        if boundary.boundary < at:
            standing = follow_on(standing, boundary, image)
    shielded = set(trace.protected(traced)[image])
    for patch in patches:
        if standing[patch] in shielded:
            raise InputError(f"patch {patch}: an encode stage protects it; drop another one")
    places = {standing[patch] for patch in patches}
    left = [boundary.kept for boundary in traced.boundaries if boundary.boundary <= at]
    if not places & set((left[-1] if left else trace.entering(traced))[image]):
        which = f"patch {patches[0]}" if len(patches) == 1 else f"patches {', '.join(map(str, patches))}"
        raise InputError(f"{which}: gone from boundary {at} on in the traced run, too; drop what is live there")
    data = traced.model_dump()
    if at not in [boundary.boundary for boundary in traced.boundaries]:
        data["boundaries"] = sorted([*data["boundaries"], _new(trace, traced, at)], key=lambda each: each["boundary"])
    for boundary in data["boundaries"]:
        if boundary["boundary"] >= at:
            boundary["kept"][image] = [p for p in boundary["kept"][image] if p not in places]
            _leave_merges(boundary, image, places)
            if boundary.get("merged"):  # what would be merged into a dropped token is dropped, too
                boundary["merged"][image] = [m for m in boundary["merged"][image] if m["into"] not in places]
    return _with_run(trace, run, data)


def _kept_by_encoder(steps: Sequence[dict[str, Any]], patches: int, patch: int, image: int) -> int:
    """Edit the steps so that a row of the patch reaches the LLM; return the place of that row."""
    place, before = patch, set(range(patches))
    for step in steps:
        own, shift = step["images"][image], step["shift"]
        if place >= shift:
            images = [EncodedImage.model_validate(each) for each in step["images"]]
            to, home, _ = moves(images, image).get(place - shift, (None, image, 0))
            if to is None or home != image:  # a row of its own, if that of another frame stands for it
                free = {p - shift for p in before if p >= shift}.difference(own["kept"])
                if not free:
                    raise InputError(
                        f"patch {patch}: the rows of stage {step['stage']!r} leave no place for it; keep fewer patches"
                    )
                to = min(free, key=lambda other: abs(other - place + shift))
                _add_row(own, place - shift, to)
            place = to + shift
        before = {*range(shift), *(p + shift for p in own["kept"])}
    return place


def _add_row(own: dict[str, Any], row: int, place: int) -> None:
    """Keep one more row of an image, unchanged, in a free place."""
    position = bisect.bisect(own["kept"], place)
    own["kept"].insert(position, place)
    if own["sizes"] is not None:
        own["sizes"].insert(position, 1.0)
    if place != row:
        own["merged"].append({"into": place, "of": [row]})


def _leave_merges(boundary: dict[str, Any], image: int, places: set[int]) -> None:
    """Remove tokens from the merges of a boundary, except those that others are merged into."""
    if boundary.get("merged"):
        for home, merges in enumerate(boundary["merged"]):
            left = []
            for merge in merges:
                sources = Merge.model_validate(merge).sources(home)
                stay = [(p, i) for p, i in sources if i != image or p not in places or (p, i) == (merge["into"], home)]
                images = {"images": [i for _, i in stay]} if merge.get("images") else {}
                left.append(merge | {"of": [p for p, _ in stay]} | images)
            boundary["merged"][home] = [merge for merge in left if len(merge["of"]) > 1]


def _new(trace: Trace, run: TracedRun, at: int) -> dict[str, Any]:
    """Return a new boundary that drops nothing yet."""
    earlier = [boundary.kept for boundary in run.boundaries if boundary.boundary < at]
    kept = earlier[-1] if earlier else trace.entering(run)
    dropped: list[list[int]] = [[] for _ in kept]
    return {"boundary": at, "kept": [list(own) for own in kept], "by": [{"stage": EDIT, "dropped": dropped}]}


def _check_there(trace: Trace, patches: Sequence[int], image: int) -> None:
    images = trace.prompt.images
    if not 0 <= image < len(images):
        known = "image 0 alone" if len(images) == 1 else f"images 0 to {len(images) - 1}"
        raise InputError(f"image {image}: the trace has {known}; name one of its images")
    for patch in patches:
        last = len(images[image].index) - 1
        if not 0 <= patch <= last:
            raise InputError(f"patch {patch}: image {image} has patches 0 to {last}; name one of these")


def _with_run(trace: Trace, run: int, data: dict[str, Any]) -> Trace:
    try:
        changed = TracedRun.model_validate(data)
        return Trace(
            **{name: getattr(trace, name) for name in ("format", "model", "depth", "prompt")},
            runs=[changed if number == run else own for number, own in enumerate(trace.runs)],
        )
    except ValidationError as error:
        raise InputError("; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())) from None
