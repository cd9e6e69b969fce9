"""Builds the static HTML page of a trace: data in compact form, inserted into the page in `web`, which draws it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from dropflow_lab.trace.follow import GONE, Followed, follow, follow_on, merged_away, merged_elsewhere
from dropflow_lab.trace.pictures import data_uris
from dropflow_lab.trace.schema import Scores, Trace, TracedEncode, TracedEviction, TracedRun

if TYPE_CHECKING:
    from PIL.Image import Image

_SCRIPTS = ("fates.js", "drawing.js", "panels.js")
_OUTSIDE_LAYERS: dict[Any, str] = {
    "pixels": "the pixels (before the encoder ran)",
    "features": "the projector's input",
    None: "the encoder's output",
}


def page(trace: Trace, pictures: Sequence[Image | None] = ()) -> str:
    """Return the page: all runs of `trace` side by side, over one picture per image of its prompt (or none).

    The page is self-contained and makes no network requests. Strings of the trace are never parsed as HTML.
    """
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
        "videos": trace.prompt.videos,
        "runs": [_run(trace, run) for run in trace.runs],
    }
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    # so that no text can end the script element or open a comment in it
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return _template().replace("{{data}}", text)


def _template() -> str:
    """The page without data."""

    def read(name: str) -> str:
        return resources.files(__package__).joinpath("web", name).read_text(encoding="utf-8")

    script = "\n".join(map(read, _SCRIPTS))
    return read("page.html").replace("{{style}}", read("page.css")).replace("{{script}}", script)


def _strip(patches: int) -> tuple[int, int]:
    """Return the rows and columns in which to show patches without a known grid."""
    columns = max(1, min(patches, 32))
    return -(-patches // columns), columns


def _run(trace: Trace, run: TracedRun) -> dict[str, Any]:
    images = trace.prompt.images
    followed = [follow(trace, run, image) for image in range(len(images))]
    where = {token: (i, p) for i, image in enumerate(images) for p, token in enumerate(image.index)}
    entering = trace.entering(run)
    return {
        "name": run.name,
        "positions": run.positions,
        "answer": run.answer,
        "entry": run.entry,
        "exit": run.exit,
        "enteredBy": run.entered_by,
        "exitedBy": run.exited_by,
        "places": [None if own.entering == list(range(len(own.entering))) else own.entering for own in followed],
        "heads": [own.heads() for own in followed],
        "others": [own.others for own in followed],
        "away": [_away(run, own) for own in followed],
        "alone": [sorted(set(rows).difference(own.entering)) for rows, own in zip(entering, followed, strict=True)],
        "lost": [_lost(run, own) for own in followed],
        "protected": trace.protected(run),
        "boundaries": _boundaries(trace, run),
        "layers": [[layer.visual_tokens, layer.kv_entries, round(layer.flops)] for layer in run.layers],
        "calls": [
            {
                "text": call.text,
                "kv": call.kv_entries,
                "read": {layer: read.entries for read in call.read for layer in read.layers},
                "evicted": [_evicted(e, where, len(images)) for e in call.evicted],
            }
            for call in run.calls
        ],
        "scores": [*_encoder_scores(run, followed), *_scores(run, followed)],
    }


def _boundaries(trace: Trace, run: TracedRun) -> list[dict[str, Any]]:
    """Return the events of each boundary; `gone` counts tokens dropped, tokens merged, and the tokens they became."""
    sizes = [len(image.index) for image in trace.prompt.images]
    found, before = [], sum(map(len, trace.entering(run)))
    for boundary in run.boundaries:
        kept = sum(map(len, boundary.kept))
        away = [merged_away(boundary, image) for image in range(len(sizes))]
        gone = [
            {place: into for place, into in own.items() if place not in live}
            for own, live in zip(away, map(set, boundary.kept), strict=True)
        ]
        elsewhere = [merged_elsewhere(boundary, image) for image in range(len(sizes))]
        merged = sum(map(len, gone)) + sum(map(len, elsewhere))
        homes = {(image, into) for image, own in enumerate(gone) for into in own.values()}
        homes |= {home for own in elsewhere for home in own.values()}
        found.append(
            {
                "at": boundary.boundary,
                "kept": list(map(_bits, boundary.kept, sizes)),
                "by": [{"stage": own.stage, "dropped": list(map(_bits, own.dropped, sizes))} for own in boundary.by],
                "into": away,
                "away": elsewhere,
                "mergedBy": boundary.merged_by,
                "gone": [before - kept - merged, merged, len(homes)],
            }
        )
        before = kept
    return found


def _lost(run: TracedRun, own: Followed) -> dict[int, str]:
    """Map each patch that does not reach the LLM to where in the encoder it was dropped."""
    return {patch: f"{_place(step)} by {step.stage}" for step, patch in _leaving(run, own) if patch not in own.away}


def _away(run: TracedRun, own: Followed) -> dict[int, str]:
    """Map each patch for which a row of another frame stands to that row, and to where in the encoder it was merged."""
    return {
        patch: "patch {1} of image {0} at ".format(*own.away[patch]) + f"{_place(step)} by {step.stage}"
        for step, patch in _leaving(run, own)
        if patch in own.away
    }


def _leaving(run: TracedRun, own: Followed) -> Iterator[tuple[TracedEncode, int]]:
    """Yield each patch that no row of its image stands for any more, and the step after which none does."""
    for step, before, after in zip(run.encode, own.places[:-1], own.places[1:], strict=True):
        for patch, place in enumerate(after):
            if place == GONE != before[patch]:
                yield step, patch


def _place(step: TracedEncode) -> str:
    """Return where on the vision side a stage ran."""
    if isinstance(step.boundary, float):
        return f"the middle of vision layer {int(step.boundary)}"
    return _OUTSIDE_LAYERS.get(step.boundary, f"vision boundary {step.boundary}")


def _encoder_scores(run: TracedRun, followed: Sequence[Followed]) -> list[dict[str, Any]]:
    found = []
    for number, step in enumerate(run.encode):
        if any(image.scores is not None for image in step.images):
            values = [
                _of_cells(image.scores or [], own.places[number], step.shift)
                for image, own in zip(step.images, followed, strict=True)
            ]
            found.append({"stage": step.stage, "at": _place(step), "values": values})
    return found


def _scores(run: TracedRun, followed: Sequence[Followed]) -> list[dict[str, Any]]:
    found, places = [], [own.entering for own in followed]
    for boundary in run.boundaries:
        for pruning in boundary.by:
            if pruning.scores is not None:
                values = [_of_cells(own, place) for own, place in zip(pruning.scores, places, strict=True)]
                found.append({"stage": pruning.stage, "at": f"boundary {boundary.boundary}", "values": values})
        places = [follow_on(own, boundary, image) for image, own in enumerate(places)]
    return found


def _of_cells(scores: Scores, places: Sequence[int], shift: int = 0) -> Scores:
    """Return the score of each patch's row, with three significant digits; null where there is none."""
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
    """Return patches as bits, lowest first, in base64."""
    packed = bytearray(-(-count // 8))
    for patch in chosen:
        packed[patch // 8] |= 1 << patch % 8
    return base64.b64encode(packed).decode()
