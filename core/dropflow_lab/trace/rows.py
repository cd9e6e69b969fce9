"""Rebuilds rows of the vision encoder from a trace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dropflow_lab.trace.schema import EncodedImage, Merge


def made_again(
    features: Float[Tensor, "rows dim"],
    prefix: Float[Tensor, "prefix dim"],
    held: Sequence[int],
    image: EncodedImage,
) -> Float[Tensor, "kept dim"]:
    """Return the rows of one image after a step that made new ones; `held` is the patch of each of `features`.

    Equal shares are taken as the plain mean of the members, others as a sum in float32.
    """
    slot = {place: i for i, place in enumerate(held)}
    whole = torch.cat((features, prefix))
    merged = {merge.into: merge for merge in image.merged or ()}
    rows = features.new_empty(len(image.kept), features.shape[1])
    alone = [n for n, place in enumerate(image.kept) if place not in merged]
    rows[alone] = features[[slot[image.kept[n]] for n in alone]]
    for (_, plain), numbers in _alike(image.kept, merged).items():
        merges = [merged[image.kept[n]] for n in numbers]
        rows_of = [[*(slot[p] for p in merge.of), *(len(held) + p for p in merge.prefix)] for merge in merges]
        members = whole[torch.tensor(rows_of)]  # (merges, members, dim)
        if plain:
            rows[numbers] = members.mean(1)
            continue
        weights = torch.tensor([merge.shares for merge in merges], device=features.device)
        rows[numbers] = (members.float() * weights[:, :, None]).sum(1).to(rows.dtype)
    return rows


def shares(
    prefix: Float[Tensor, "prefix dim"], held: Sequence[int], image: EncodedImage
) -> Float[Tensor, "kept rows+prefix"]:
    """Return the weights of old rows and prefix rows in each new row, by rebuilding from unit vectors."""
    unit = torch.eye(len(held) + len(prefix), device=prefix.device)
    return made_again(unit[: len(held)], unit[len(held) :], held, image)


def _alike(kept: Sequence[int], merged: dict[int, Merge]) -> dict[tuple[int, bool], list[int]]:
    """Group the numbers of the new rows by their count of members and by whether they are plain means."""
    groups: dict[tuple[int, bool], list[int]] = {}
    for n, place in enumerate(kept):
        merge = merged.get(place)
        if merge is not None:
            groups.setdefault((len(merge.of) + len(merge.prefix), merge.shares is None), []).append(n)
    return groups
