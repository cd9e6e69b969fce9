"""The Pixtral tower, which packs the patches of all pictures into one sequence; Mistral 3 and some LLaVAs have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from dropflow import VisionReader, feature_boundary, patch_blocks


def pixtral_reader(tower: Any, selected: int | Sequence[int], merge: int) -> VisionReader:
    """The tower of a model that hands on the `selected` hidden states and joins `merge` x `merge` patches."""
    encoder, patch = tower.transformer, tower.config.patch_size

    def grids(arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
        return [(int(h) // patch, int(w) // patch) for h, w in arguments["image_sizes"]]

    def pictures(arguments: Mapping[str, Any]) -> list[int]:
        return [rows * columns for rows, columns in grids(arguments)]

    def members(_: Sequence[int], arguments: Mapping[str, Any]) -> list[Tensor]:
        starts = accumulate(pictures(arguments), initial=0)  # and the total, which no grid takes
        return [patch_blocks(grid, merge) + start for grid, start in zip(grids(arguments), starts, strict=False)]

    return VisionReader(
        encoder, members, feature_layer=feature_boundary(selected, len(encoder.layers)), pictures=pictures
    )
