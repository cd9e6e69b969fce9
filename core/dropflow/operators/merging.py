"""Pure functions that merge tokens: windows of a patch grid, how alike they are, means, and where new rows go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def window_members(grid: tuple[int, int], window: tuple[int, int]) -> Int[Tensor, "windows members"]:
    """Raster indices of the patches in each window of a tiling of `grid` (rows, columns), both in raster order.

    Windows do not overlap. Rows and columns after the last whole window belong to none; there may be no window at all.
    """
    (rows, columns), (high, wide) = grid, window
    down, across = rows // high, columns // wide
    index = torch.arange(rows * columns).view(rows, columns)[: down * high, : across * wide]
    return index.reshape(down, high, across, wide).permute(0, 2, 1, 3).reshape(down * across, high * wide)


def window_similarity(
    features: Float[Tensor, "patches dim"], members: Int[Tensor, "windows members"]
) -> Float[Tensor, "windows"]:
    """Mean cosine similarity over the ordered pairs of different members of each window, in float32 at least.

    Cosines are taken in the dtype of `features`; a zero vector has cosine 0 with everything.
    """
    count = members.shape[1]
    others = 1 - torch.eye(count, device=features.device)
    step = max(1, len(features) // count**2)  # so that no product is larger than the features themselves
    found = []
    for some in torch.split(members, step):
        patches = features[some].transpose(1, 2).contiguous()  # (windows, dim, members)
        cosines = torch.nn.functional.cosine_similarity(patches[..., None], patches[..., None, :], dim=1)
        found.append((cosines * others).sum(-1).sum(-1) / max(count * (count - 1), 1))
    return torch.cat(found) if found else features.new_zeros(0, dtype=torch.float32)


def merge_windows(
    features: Float[Tensor, "patches dim"], members: Int[Tensor, "windows members"], taken: Int[Tensor, "merged"]
) -> tuple[Float[Tensor, "merged dim"], Int[Tensor, "left"]]:
    """The mean of each window in `taken`, in that order, and the ascending indices of the patches in none of them."""
    inside = members[taken]
    left = torch.ones(len(features), dtype=torch.bool, device=features.device)
    left[inside.flatten()] = False
    return features[inside].mean(1), left.nonzero()[:, 0]


def first_places(
    places: Sequence[Int[Tensor, "held"]], rows: Sequence[Float[Tensor, "new dim"]]
) -> tuple[Int[Tensor, "new"], ...]:
    """For each image, the first of its `places`, one for each new row.

    For methods whose rows have no place in the raster. Rows keep their order; no image may have more rows than places.
    """
    return tuple(held[: len(new)] for held, new in zip(places, rows, strict=True))


def most_alike(
    states: Float[Tensor, "batch slots dim"], stays: Bool[Tensor, "batch slots"], group: Int[Tensor, "batch slots"]
) -> Int[Tensor, "batch slots"]:
    """For every slot that does not stay, the slot of its group (number; -1 for none) that does and is most alike.

    Likeness is the cosine in float32, ties going to the first; a slot that stays, is in no group, or has no other one
    to go to names itself. Works sample by sample, so that no more than one map of slots is held.
    """
    own = torch.arange(states.shape[1], device=states.device)
    found = []
    for state, stay, number in zip(states.float(), stays, group, strict=True):
        unit = torch.nn.functional.normalize(state, dim=1)
        open_to = (number[:, None] == number) & stay & (number >= 0)
        cosine = torch.where(open_to, unit @ unit.T, -torch.inf)
        found.append(torch.where(stay | ~open_to.any(1), own, cosine.argmax(1)))
    return torch.stack(found)


def mean_into(
    states: Float[Tensor, "batch slots dim"], into: Int[Tensor, "batch slots"]
) -> Float[Tensor, "batch slots dim"]:
    """States in which every slot that is named in `into` holds the mean of the states that name it.

    A slot that only one state names holds exactly that state, and a slot that none names keeps its own; means are
    taken in float32 at least.
    """
    own = torch.arange(into.shape[1], device=states.device).expand_as(into)
    source = own.scatter(1, into, own)  # right where at most one state names the slot
    count = torch.zeros(into.shape, device=states.device).scatter_add(1, into, torch.ones_like(into).float())
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    sums = torch.zeros_like(wide).scatter_add(1, into[:, :, None].expand_as(wide), wide)
    means = (sums / count.clamp(min=1)[:, :, None]).to(states.dtype)
    return torch.where((count > 1)[:, :, None], means, states.gather(1, source[:, :, None].expand_as(states)))
