"""Follows the patches of a picture through the vision encoder and the LLM: which row or token stands for each one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dropflow_lab.trace.schema import EncodedImage, Trace, TracedBoundary, TracedRun

GONE = -1
"""Place of a patch that no row stands for."""


@dataclass(frozen=True)
class Followed:
    """The patches of one image on their way to the LLM. A place is the patch whose placeholder a row fills."""

    places: list[list[int]]
    """Before each encode step, and after the last: per patch, the place of the row that stands for it.

    That is the row in which the patch has its largest share, the first one if there are several.
    """
    weights: list[float]
    """Share of each patch in its row after the last step, over all steps."""
    others: dict[int, int]
    """Patch -> number of other rows in which it has a share."""
    away: dict[int, tuple[int, int]]
    """Patch that a row of another frame stands for -> the image and the place of that row."""

    @property
    def entering(self) -> list[int]:
        """Return the places at entry to the LLM."""
        return self.places[-1]

    def heads(self) -> dict[int, int]:
        """Map the place of each merged row to the one patch that makes up at least half of it, if there is one."""
        groups: dict[int, list[int]] = {}
        for patch, place in enumerate(self.entering):
            if place != GONE:
                groups.setdefault(place, []).append(patch)
        heads = {}
        for place, patches in groups.items():
            half = sum(self.weights[patch] for patch in patches) / 2 * (1 - 1e-6)
            most = [patch for patch in patches if self.weights[patch] >= half]
            if len(patches) > 1 and len(most) == 1:
                heads[place] = most[0]
        return heads


def follow(trace: Trace, run: TracedRun, image: int) -> Followed:
    """Follow every patch of one image through the encode steps of a run."""
    count = len(trace.prompt.images[image].index)
    places, weights, others = [list(range(count))], [1.0] * count, dict[int, int]()
    away = dict[int, tuple[int, int]]()
    for step in run.encode:
        moved = moves(step.images, image)
        replaced = {(home, merge.into) for home, own in enumerate(step.images) for merge in own.merged or ()}
        rows = Counter(
            place
            for home, own in enumerate(step.images)
            for merge in own.merged or ()
            for place, source in merge.sources(home)
            if source == image
        )
        after = list(places[-1])
        for patch, place in enumerate(after):
            if place == GONE or place < step.shift:
                continue
            to, home, share = moved.get(place - step.shift, (GONE - step.shift, image, 0.0))
            after[patch] = to + step.shift if home == image else GONE
            if home != image:
                away[patch] = home, to + step.shift
            weights[patch] *= share
            elsewhere = rows[place - step.shift] - ((home, to) in replaced)
            if elsewhere:
                others[patch] = elsewhere
        places.append(after)
    return Followed(places, weights, others, away)


def merged_away(boundary: TracedBoundary, image: int) -> dict[int, int]:
    """Map the places of one image whose states move to another place at this boundary to their new places.

    If such a place is in `kept`, it holds another state from here on.
    """
    kept = set(boundary.kept[image])
    merges = boundary.merged[image] if boundary.merged else []
    stay = kept - {merge.into for merge in merges}
    return {
        place: merge.into
        for merge in merges
        for place, source in merge.sources(image)
        if source == image and place != merge.into and place not in stay
    }


def merged_elsewhere(boundary: TracedBoundary, image: int) -> dict[int, tuple[int, int]]:
    """Map the places of one image whose states move into another image at this boundary to its number and their place.

    Only states whose own token goes are listed.
    """
    kept = set(boundary.kept[image])
    return {
        place: (home, merge.into)
        for home, merges in enumerate(boundary.merged)
        if home != image
        for merge in merges
        for place, source in merge.sources(home)
        if source == image and place not in kept
    }


def follow_on(places: Sequence[int], boundary: TracedBoundary, image: int) -> list[int]:
    """Return the places of the tokens that stand for patches after one boundary of the LLM, dropped ones as before."""
    into = merged_away(boundary, image)
    return [into.get(place, place) for place in places]


def moves(images: Sequence[EncodedImage], image: int) -> dict[int, tuple[int, int, float]]:
    """Map the place of a row of `image` before a step to that of its row after it, the row's image, and its share.

    Dropped rows are missing.
    """
    replaced = {merge.into for merge in images[image].merged or ()}
    found = {place: (place, image, 1.0) for place in images[image].kept if place not in replaced}
    for home, own in enumerate(images):
        for merge in own.merged or ():
            shares = merge.shares or [1 / (len(merge.of) + len(merge.prefix))] * len(merge.of)
            for (place, source), share in zip(merge.sources(home), shares, strict=False):  # prefix rows come last
                if source == image and share > found.get(place, (GONE, image, 0.0))[2]:
                    found[place] = merge.into, home, share
    return found
