"""Merged patches on the page of a trace: counted apart from dropped ones, drawn unlike them, and followed."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import policy

from dropflow import load_policy
from dropflow_lab.digits.checkpoints.model import load, sample_image
from dropflow_lab.trace import Trace, page, record

MERGING = {
    "sparse": policy(sparse={"use": "sparsevlm/text-guided", "keep": {2: 60, 5: 30, 8: 9}, "cluster_size": 5}),
    "zip": policy(zip={"use": "visionzip/dominant-contextual", "dominant": 30, "contextual": 9}),
    "prumerge": policy(merge={"use": "prumerge/prune-merge", "ratio": 0.1, "neighbours": 6}),
    "tome": policy(
        tome={"use": "tome/token-merging", "r": 20, "layers": 3}, p={"use": "hidrop/concave-pyramid", "keep": {6: 30}}
    ),
}
SKY = (90, 140, 190)


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory, opened: Any) -> Iterator[tuple[Any, Trace]]:
    """A page of policies that merge, over a picture of one colour."""
    model, processor = load()
    policies = [load_policy(which | {"name": name}) for name, which in MERGING.items()]
    trace = record(model, processor, [sample_image()], "read all digits row by row .", policies, 3)
    file: Path = tmp_path_factory.mktemp("page") / "merging.html"
    file.write_text(page(trace, [Image.new("RGB", (96, 96), SKY)]), encoding="utf-8")
    tab, noticed = opened(file)
    yield tab, trace
    assert noticed == []


def tokens_of(trace: Trace, number: int, layer: int) -> list[int | None]:
    """For each patch, the place of the token that it is part of before a layer, by the trace."""
    run = trace.runs[number]
    place: list[int | None] = list(range(len(trace.prompt.images[0].index)))
    for step in run.encode:
        merges = step.images[0].merged or []
        found = {p: (1.0, p) for p in step.images[0].kept if p not in {merge.into for merge in merges}}
        for merge in merges:
            for p, share in zip(merge.of, merge.shares or [1 / max(len(merge.of), 1)] * len(merge.of), strict=False):
                if share > found.get(p, (0.0, 0))[0]:
                    found[p] = share, merge.into
        place = [found[p][1] if p in found else None for p in place]  # type: ignore[index]
    for boundary in run.boundaries:
        if boundary.boundary <= layer:
            moved = {p: m.into for m in (boundary.merged or [[]])[0] for p in m.of}
            place = [p if p is None or p in boundary.kept[0] else moved.get(p) for p in place]
            place = [p if p in boundary.kept[0] else None for p in place]
    return place


@pytest.mark.parametrize("layer", [0, 2, 5, 8])
def test_merged_and_dropped_patches_are_counted_apart(merging: Any, layer: int) -> None:
    tab, trace = merging
    show(tab, layer)
    for number, told in enumerate(tab.locator(".parts").all_text_contents()):
        tokens = Counter(tokens_of(trace, number, layer))
        dropped = tokens.pop(None, 0)
        groups = [size for size in tokens.values() if size > 1]
        alone = trace.runs[number].layers[layer].visual_tokens - len(tokens)
        counts = {"merged": (sum(groups), len(groups)), "dropped": dropped, "shown at no patch": alone}
        read = {"merged": (0, 0), "dropped": 0, "shown at no patch": 0}
        for part in told.split(" · ") if told != "all patches live" else ():
            if found := re.fullmatch(r"(\d+) patch(?:es)? merged into (\d+) tokens?", part):
                read["merged"] = int(found[1]), int(found[2])
            elif found := re.fullmatch(r"(\d+) (?:tokens? )?(dropped|shown at no patch)", part):
                read[found[2]] = int(found[1])
            else:
                raise AssertionError(part)
        assert read == counts
    drawn = [int(map.get_attribute("data-live")) for map in tab.locator("canvas.map").all()]
    assert drawn == [run.layers[layer].visual_tokens for run in trace.runs]


def show(tab: Any, layer: int) -> None:
    tab.evaluate(f"document.getElementById('layer').value = {layer}; update()")


def point(tab: Any, number: int, patch: int) -> str:
    """Point at a patch of a run, of 12 in a row, and read what the page says of it."""
    map = tab.locator("canvas.map").nth(number)
    size = map.bounding_box()["width"] / 12
    map.hover(position={"x": (patch % 12 + 0.5) * size, "y": (patch // 12 + 0.5) * size})
    return str(tab.locator("[role=status]").nth(number).text_content())


def test_a_patch_says_into_which_one_it_went(merging: Any) -> None:
    tab, trace = merging
    sparse, boundary = trace.runs[0], trace.runs[0].boundaries[0]
    show(tab, 2)
    cluster = max(boundary.merged[0], key=lambda merge: len(merge.of))
    member = next(p for p in cluster.of if p != cluster.into)
    count = f"{len(cluster.of)} patches are one token"
    told = f"Image 0, patch {member}: merged into patch {cluster.into} at boundary 2 by sparse; "
    assert point(tab, 0, member).startswith(f"{told}{count} (with ")
    assert point(tab, 0, cluster.into).startswith(f"Image 0, patch {cluster.into}: merged into this patch: {count}")
    gone = next(
        p for m in boundary.merged[0] for p in m.of if p != m.into and tokens_of(trace, 0, 11)[p] is None
    )  # fmt: skip
    show(tab, 11)
    assert re.search(r"merged into patch \d+ at boundary 2 by sparse, then .*dropped at boundary \d by sparse",
                     point(tab, 0, gone))  # fmt: skip
    assert not any(call.evicted for call in sparse.calls)
    show(tab, 0)
    contextual = next(merge for merge in reversed(trace.runs[1].encode[0].images[0].merged or ()) if len(merge.of) > 3)
    target = contextual.of[(contextual.shares or []).index(1.0)]
    joined = next(p for p in contextual.of if p != target)
    assert f"patch {joined}: merged into patch {target}: {len(contextual.of)} patches are" in point(tab, 1, joined)
    merges = trace.runs[2].encode[0].images[0].merged or []
    shared = Counter(p for merge in merges for p in merge.of)
    most, rows = shared.most_common(1)[0]
    assert f"The encoder gave {rows - 1} other tokens a share of it, too." in point(tab, 2, most)


def test_a_merged_patch_looks_neither_dropped_nor_live(merging: Any) -> None:
    """By shape, not by colour alone: a dropped one is covered, a merged one shows the picture inside an outline."""
    tab, trace = merging
    show(tab, 2)
    point(tab, 1, 0)  # so that no patch of the first picture is pointed at
    tokens, boundary = tokens_of(trace, 0, 2), trace.runs[0].boundaries[0]
    member = next(p for m in boundary.merged[0] for p in m.of if p != m.into and tokens.count(tokens[p]) > 2
                  and tokens[p] not in {tokens[q] for q in (p - 1, p + 1, p - 12, p + 12) if 0 <= q < 144})  # fmt: skip
    live = next(p for p, token in enumerate(tokens) if token is not None and tokens.count(token) == 1)

    data = tab.evaluate("document.querySelector('canvas.map').toDataURL()").split(",")[1]
    drawn = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    size = drawn.width / 12

    def pixels(patch: int) -> list[Any]:
        """Colours of a cell between marks, at its upper edge, and on its ring."""
        found = ((0.2, 0.2), (0.5, 0.04), (0.5 + 1 / 4.5, 0.5))
        return [drawn.getpixel((round((patch % 12 + u) * size), round((patch // 12 + v) * size))) for u, v in found]

    green = (0, 158, 115)
    assert pixels(member) == [SKY, green, green]
    assert pixels(live)[0] == SKY != pixels(tokens.index(None))[0]
    assert green not in pixels(tokens.index(None))
