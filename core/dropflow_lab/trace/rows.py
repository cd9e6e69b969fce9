"""Rebuilds rows of the vision encoder from a trace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dropflow_lab.trace.schema import Merge, TracedEncode


def made_again(
    features: Sequence[Float[Tensor, "rows dim"]],
    prefix: Float[Tensor, "prefix dim"],
    held: Sequence[Sequence[int]],
    step: TracedEncode,
    number: int,
) -> Float[Tensor, "kept dim"]:
    """Return the rows of image `number` after a step that made new ones; `held` are the patches of all `features`.

    Equal shares are taken as the plain mean of the members, others as a sum in float32. Rows may be made of those of
    other frames.
    """
    image, sources = step.images[number], _sources(step, number)
    slot, start = {}, 0
    for own in sources:
        slot.update({(place, own): start + i for i, place in enumerate(held[own])})
        start += len(held[own])
    whole = torch.cat([*(features[own] for own in sources), prefix])
    merged = {merge.into: merge for merge in image.merged or ()}
    rows = whole.new_empty(len(image.kept), whole.shape[1])
    alone = [n for n, place in enumerate(image.kept) if place not in merged]
    rows[alone] = whole[[slot[image.kept[n], number] for n in alone]]
    for (_, plain), numbers in _alike(image.kept, merged).items():
        merges = [merged[image.kept[n]] for n in numbers]
        rows_of = [[*map(slot.__getitem__, m.sources(number)), *(start + p for p in m.prefix)] for m in merges]
        members = whole[torch.tensor(rows_of)]  # (merges, members, dim)
        if plain:
            rows[numbers] = members.mean(1)
            continue
        weights = torch.tensor([merge.shares for merge in merges], device=whole.device)
        rows[numbers] = (members.float() * weights[:, :, None]).sum(1).to(rows.dtype)
    return rows


def shares(
    prefix: Float[Tensor, "prefix dim"],
    held: Sequence[Sequence[int]],
    step: TracedEncode,
    number: int,
    videos: Sequence[Sequence[int]],
) -> Float[Tensor, "kept rows+prefix"]:
    """Return the weights of old and prefix rows in each new row of image `number`, by rebuilding from unit vectors.

    Where rows of some image were made across frames, old rows are those of all frames of its video.
    """
    frames = [number]
    if across_frames(step):
        frames = next((list(video) for video in videos if number in video), frames)
    counts = [len(held[frame]) for frame in frames]
    unit = torch.eye(sum(counts) + len(prefix), device=prefix.device)
    parts = dict(zip(frames, torch.split(unit[: sum(counts)], counts), strict=True))
    features = [parts.get(own, unit[:0]) for own in range(len(held))]
    return made_again(features, unit[sum(counts) :], held, step, number)


def across_frames(step: TracedEncode) -> bool:
    """Whether a step made rows of rows of other images."""
    return any(merge.images for own in step.images for merge in own.merged or ())


def _sources(step: TracedEncode, number: int) -> list[int]:
    """Return the images of whose rows those of image `number` are made, itself first."""
    others = {own for merge in step.images[number].merged or () for own in merge.images} - {number}
    return [number, *sorted(others)]


def _alike(kept: Sequence[int], merged: dict[int, Merge]) -> dict[tuple[int, bool], list[int]]:
    """Group the numbers of the new rows by their count of members and by whether they are plain means."""
    groups: dict[tuple[int, bool], list[int]] = {}
    for n, place in enumerate(kept):
        merge = merged.get(place)
        if merge is not None:
            groups.setdefault((len(merge.of) + len(merge.prefix), merge.shares is None), []).append(n)
    return groups
