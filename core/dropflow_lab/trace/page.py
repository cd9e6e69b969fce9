"""The trace as one static HTML page: data in compact form, put into `page.html`, which draws it."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from dropflow_lab.trace.pictures import data_uris
from dropflow_lab.trace.schema import Scores, Trace, TracedEncode, TracedEviction, TracedRun

if TYPE_CHECKING:
    from PIL.Image import Image

GONE = -1
"""Place of a patch that no row stands for."""
_OUTSIDE_LAYERS: dict[Any, str] = {None: "the encoder's output", "features": "what the projector gets"}


def page(trace: Trace, pictures: Sequence[Image | None] = ()) -> str:
    """Return the page: all runs of `trace` side by side, over one picture per image of its prompt (or none).

    The page is self-contained and asks no network. Texts of the trace are only ever shown as text.
    """
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    shown = pictures or [None] * len(trace.prompt.images)
    data = {
        "model": trace.model,
        "depth": trace.depth,
        "question": trace.prompt.question,
        "tokens": trace.prompt.tokens,
        "images": [
            {"patches": len(image.index), "grid": image.grid or _strip(len(image.index)), "picture": uri}
            for image, uri in zip(trace.prompt.images, data_uris(shown), strict=True)
        ],
        "runs": [_run(trace, run) for run in trace.runs],
    }
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    # so that no text can end the script element or open a comment in it
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return template.replace("{{data}}", text)


def _strip(patches: int) -> tuple[int, int]:
    """Rows and columns to show patches in whose grid is not known."""
    columns = max(1, min(patches, 32))
    return -(-patches // columns), columns


def _run(trace: Trace, run: TracedRun) -> dict[str, Any]:
    images = trace.prompt.images
    places, lost, scores = _follow(trace, run)
    for boundary in run.boundaries:
        for pruning in boundary.by:
            if pruning.scores is not None:
                values = [_of_cells(own, place) for own, place in zip(pruning.scores, places, strict=True)]
                scores.append({"stage": pruning.stage, "at": f"boundary {boundary.boundary}", "values": values})
    where = {token: (i, p) for i, image in enumerate(images) for p, token in enumerate(image.index)}
    return {
        "name": run.name,
        "positions": run.positions,
        "answer": run.answer,
        "entry": run.entry,
        "exit": run.exit,
        "enteredBy": run.entered_by,
        "exitedBy": run.exited_by,
        "places": [None if own == list(range(len(own))) else own for own in places],
        "encoded": [len(own) for own in trace.entering(run)],
        "lost": lost,
        "protected": trace.protected(run),
        "boundaries": [
            {
                "at": boundary.boundary,
                "kept": [_bits(own, len(image.index)) for own, image in zip(boundary.kept, images, strict=True)],
                "by": [
                    {
                        "stage": pruning.stage,
                        "dropped": [_bits(o, len(i.index)) for o, i in zip(pruning.dropped, images, strict=True)],
                    }
                    for pruning in boundary.by
                ],
            }
            for boundary in run.boundaries
        ],
        "layers": [[layer.visual_tokens, layer.kv_entries, round(layer.flops)] for layer in run.layers],
        "calls": [
            {
                "text": call.text,
                "kv": call.kv_entries,
                "evicted": [_evicted(e, where, len(images)) for e in call.evicted],
            }
            for call in run.calls
        ],
        "scores": scores,
    }


def _follow(trace: Trace, run: TracedRun) -> tuple[list[list[int]], list[Any], list[dict[str, Any]]]:
    """Per image and patch, the place whose row stands for it at entry to the LLM; who dropped the others; scores."""
    places = [list(range(len(image.index))) for image in trace.prompt.images]
    lost: list[dict[int, str]] = [{} for _ in places]
    scores: list[dict[str, Any]] = []
    for step in run.encode:
        at = _OUTSIDE_LAYERS.get(step.boundary, f"vision boundary {step.boundary}")
        ranked = [image.scores for image in step.images]
        if any(own is not None for own in ranked):
            values = [_of_cells(own or [], p, step.shift) for own, p in zip(ranked, places, strict=True)]
            scores.append({"stage": step.stage, "at": at, "values": values})
        for number, own in enumerate(places):
            moved = _moves(step, number)
            for cell, place in enumerate(own):
                if place == GONE or place < step.shift:
                    continue
                own[cell] = moved.get(place - step.shift, GONE - step.shift) + step.shift
                if own[cell] == GONE:
                    lost[number][cell] = f"{at} by {step.stage}"
    return places, lost, scores


def _moves(step: TracedEncode, image: int) -> dict[int, int]:
    """Place of a row before the step -> place of the row that stands for it behind; dropped ones are missing."""
    own = step.images[image]
    replaced = {merge.into for merge in own.merged or ()}
    moves = {place: place for place in own.kept if place not in replaced}
    most: dict[int, float] = {}
    for merge in own.merged or ():
        shares = merge.shares or [1 / len(merge.of)] * len(merge.of)
        for place, share in zip(merge.of, shares, strict=True):
            if place not in moves and share > most.get(place, 0):
                most[place] = share
                moves[place] = merge.into
    return moves


def _of_cells(scores: Scores, places: Sequence[int], shift: int = 0) -> Scores:
    """The score of each patch's row, with three significant digits; null where there is none."""
    found: Scores = []
    for place in places:
        score = scores[place - shift] if shift <= place < len(scores) + shift else None
        found.append(None if score is None else float(f"{score:.3g}"))
    return found


def _evicted(eviction: TracedEviction, where: dict[int, tuple[int, int]], images: int) -> dict[str, Any]:
    patches: list[list[int]] = [[] for _ in range(images)]
    for token in eviction.tokens:
        if token in where:
            image, patch = where[token]
            patches[image].append(patch)
    return {"stage": eviction.stage, "layers": eviction.layers, "patches": patches}


def _bits(chosen: Sequence[int], count: int) -> str:
    """Patches as bits, lowest first, in base64."""
    packed = bytearray(-(-count // 8))
    for patch in chosen:
        packed[patch // 8] |= 1 << patch % 8
    return base64.b64encode(packed).decode()
