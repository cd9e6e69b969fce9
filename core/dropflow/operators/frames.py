"""The frames of a video as one tensor, and decisions about them as decisions about images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dropflow.errors import DecisionError

if TYPE_CHECKING:
    from dropflow.lifecycle.payloads import EncodeCall


def whole_frames(call: EncodeCall, frames: Sequence[int]) -> Float[Tensor, "frames rows dim"]:
    """The rows of a video's `frames` (one entry of `EncodeCall.videos`), for methods that compare rows by place.

    Raises `DecisionError` where the frames differ in their grids, or where an earlier stage has left them fewer rows.
    """
    grids = {call.grids[frame] for frame in frames}
    sizes = {len(call.features[frame]) for frame in frames}
    grid = next(iter(grids))
    if len(grids) > 1 or len(sizes) > 1:
        raise DecisionError(
            "compares the rows of a video's frames place by place, but they have grids "
            f"{sorted(map(str, grids))} and {sorted(sizes)} rows; give the frames of a video one size, and let no "
            "stage drop or merge their rows before this one"
        )
    if grid is not None and sizes != {grid[0] * grid[1]}:
        raise DecisionError(
            "compares the rows of a video's frames place by place, but an earlier stage has left "
            f"{sizes.pop()} of {grid[0] * grid[1]}; let this stage come first"
        )
    return torch.stack([call.features[frame] for frame in frames])


def frame_keeps(
    call: EncodeCall, keeps: Sequence[Bool[Tensor, "frames rows"] | Sequence[Bool[Tensor, "rows"]]]
) -> tuple[Bool[Tensor, "rows"], ...]:
    """`Encode.keep` of a decision about videos: one mask for each of `EncodeCall.videos`; all of a picture stays."""
    masks = [torch.ones_like(places, dtype=torch.bool) for places in call.places]
    for frames, keep in zip(call.videos or (), keeps, strict=True):
        for frame, own in zip(frames, keep, strict=True):
            masks[frame] = own
    return tuple(masks)


def frame_scores(call: EncodeCall, scores: Sequence[Float[Tensor, "frames rows"]]) -> tuple[Float[Tensor, "rows"], ...]:
    """`Encode.scores` of a decision about videos: one score for each row of their frames; NaN for those of pictures."""
    found = [torch.full(places.shape, torch.nan, device=places.device) for places in call.places]
    for frames, own in zip(call.videos or (), scores, strict=True):
        for frame, score in zip(frames, own, strict=True):
            found[frame] = score.float()
    return tuple(found)
