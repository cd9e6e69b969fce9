"""The maths of HoliTom's windows: a tiling of the video that saves as many tokens as can be."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LONGEST = 1024
"""Frames of the longest window that the released code considers."""


def similarity(frames: Float[Tensor, "frames rows dim"]) -> Float[Tensor, "steps rows"]:
    """Cosine of each row and the row at its place in the next frame, in float32, at most 1; norms are at least 1e-8.

    Rounding takes cosines of equal rows above 1, so that a threshold of 1 would hold some places still.
    """
    wide = frames.float()
    unit = wide / wide.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    cosine: Tensor = (unit[1:] * unit[:-1]).sum(-1).clamp(max=1)
    return cosine


def windows(static: Bool[Tensor, "steps rows"], longest: int = LONGEST) -> tuple[list[tuple[int, int]], int]:
    """First and last frame of each window, which tile the video, and the tokens that the tiling saves.

    `static` says which places stay the same from each frame to the next. A window of w frames saves w - 1 tokens for
    every place that is static all through it; of the tilings that save most, the one with smaller windows at the end
    is found, by dynamic programming. A window of one frame saves nothing. Reads its counts from the device once.
    """
    steps = len(static)
    alike = torch.zeros_like(static[:1]).long() if steps else static.new_zeros(1, static.shape[1]).long()
    runs = []  # for each step and place, the static steps from there on
    for step in reversed(range(steps)):
        alike = torch.where(static[step], alike[0] + 1, 0)[None]
        runs.append(alike[0])
    reach = torch.stack(runs[::-1]) if runs else static.long()
    most = min(steps, longest - 1)
    counts = [(reach >= length).sum(1).tolist() for length in range(1, most + 1)]  # by length, then by first frame
    best, taken = [0], [1]  # up to and with frame 0
    for last in range(1, steps + 1):
        saved, width = best[last - 1], 1
        for w in range(2, min(last + 1, longest) + 1):
            before = best[last - w] if last >= w else 0
            gain = before + (w - 1) * counts[w - 2][last - w + 1]
            if gain > saved:
                saved, width = gain, w
        best.append(saved)
        taken.append(width)
    found, last = [], steps
    while last >= 0:
        found.append((last - taken[last] + 1, last))
        last -= taken[last]
    return found[::-1], best[-1]
