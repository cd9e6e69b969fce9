"""The maths of spatial merging: rows of an image after its windows are merged, and the scores of its rows."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dropflow.operators import merge_windows


def merged_rows(
    features: Float[Tensor, "rows dim"],
    places: Int[Tensor, "rows"],
    members: Int[Tensor, "windows members"],
    taken: Int[Tensor, "merged"],
    *,
    raster: bool,
) -> tuple[Float[Tensor, "tokens dim"], Int[Tensor, "tokens"]]:
    """Rows of one image after the windows `taken` are merged, and the places they fill.

    Merged rows come first, or with `raster` each stands at the last patch of its window.
    """
    means, left = merge_windows(features, members, taken)
    rows = torch.cat((means, features[left]))
    if not raster:
        return rows, places[: len(rows)]
    order = torch.sort(torch.cat((members[taken][:, -1], left)))
    return rows[order.indices], places[order.values]


def window_scores(
    features: Float[Tensor, "rows dim"], members: Int[Tensor, "windows members"], similar: Float[Tensor, "windows"]
) -> Float[Tensor, "rows"]:
    """The similarity of the window that each row is in; NaN for rows in none."""
    scores = torch.full((len(features),), torch.nan, device=features.device)
    scores[members] = similar.to(scores)[:, None].expand_as(members)
    return scores
