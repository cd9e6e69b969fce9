"""The maths of HoliTom: static places of a window become clusters of means, of other rows the most attended stay."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dropflow.operators import Blend, density_peaks, top
from dropflow_holitom.windows import LONGEST, similarity, windows

NEIGHBOURS = 7
"""Nearest rows, itself included, by which the density of a row is measured."""


def blend(
    frames: Float[Tensor, "frames rows dim"],
    attention: Float[Tensor, "frames rows"],
    retention: float,
    threshold: float,
    beta: float,
    longest: int = LONGEST,
) -> Blend:
    """The rows that stay of a video, about the share `retention`.

    Places are static where the cosine from frame to frame is above `threshold`. Tokens that windows of static places
    save raise the rate of what is left. A row of a cluster is `beta` of its centre and 1 - `beta` of the mean of its
    other members. No window has more than `longest` frames.
    """
    length, rows = frames.shape[:2]
    static = similarity(frames) > threshold
    tiling, saved = windows(static, longest)
    every = length * rows
    rate = min(1.0, retention / ((every - saved) / every))
    parts = []
    for first, last in tiling:
        still = static[first:last].all(0) if last > first else torch.zeros_like(attention[0], dtype=torch.bool)
        parts += _static(frames[first : last + 1], still, first, rate, beta)
        parts += [_dynamic(attention[frame], ~still, frame, rate) for frame in range(first, last + 1)]
    return Blend.joined(parts)


def _static(
    window: Float[Tensor, "frames rows dim"], still: Bool[Tensor, "rows"], first: int, rate: float, beta: float
) -> list[Blend]:
    """One row per cluster of the means of the static places, in the window's `first` frame; at least one in all."""
    place = still.nonzero()[:, 0]
    if not len(place):
        return []
    (length, rows), count = window.shape[:2], max(1, round(len(place) * rate))
    means = window[:, place].float().mean(0)
    centres, cluster = density_peaks(means, count, min(NEIGHBOURS, count))
    is_centre = torch.zeros_like(place, dtype=torch.bool).index_fill(0, centres, True)
    others = torch.bincount(cluster, minlength=len(centres)) - 1
    alone = others[cluster] == 0
    weight = torch.where(is_centre, beta, (1 - beta) / others[cluster].clamp(min=1))
    weight = torch.where(alone, 1.0, weight).to(means) / length
    old = (torch.arange(first, first + length, device=place.device)[:, None] * rows + place).flatten()
    new = first * rows + place[centres[cluster]]
    return [Blend(old, new.repeat(length), weight.repeat(length))]


def _dynamic(attention: Float[Tensor, "rows"], moving: Bool[Tensor, "rows"], frame: int, rate: float) -> Blend:
    """The most attended of the moving rows of a frame, unchanged."""
    place = moving.nonzero()[:, 0]
    kept = place[top(attention[place], math.ceil(len(place) * rate))].sort().values + frame * len(attention)
    return Blend(kept, kept, torch.ones_like(kept, dtype=torch.float32))
