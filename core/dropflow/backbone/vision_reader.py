"""Where the layers of a vision tower are, and of which of its rows each row that the LLM gets is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dropflow.errors import UnsupportedModel, quoted
from dropflow.units import check_grid

MembersOf = Callable[[Sequence[int], Mapping[str, Any]], "list[Int[Tensor, 'rows members']]"]
"""Rows of each entry of the features and arguments of the method that encodes -> one table per entry."""
WeightsOf = Callable[[Sequence[int], Mapping[str, Any]], "list[Float[Tensor, 'rows members']]"]
"""As `MembersOf`, for the weights of these members."""


@dataclass(frozen=True)
class VisionReader:
    """A vision tower whose attention stages may read, and how its rows become those that the LLM gets.

    Rows of the tower are numbered picture after picture, in the order in which its layers hold them, prefix rows
    included. Nothing is changed inside the tower, so its rows may be pooled, shuffled or packed on their way.
    """

    owner: Any
    """Module that holds the list of layers and iterates over it once per forward; its `config` names the attention
    implementation."""
    members: MembersOf
    """Given the number of rows of each entry of the features and the arguments of `get_image_features` or
    `get_video_features`: for each entry the numbers (rows, members) of the tower rows that each of its rows is made of,
    -1 where it is made of fewer, or of none, as a newline is."""
    layers: str = "layers"
    """Name of the list in `owner`."""
    prefix: int = 0
    """Rows of every picture before its patches, such as 1 for a CLS row."""
    has_cls: bool = False
    """Whether the first of them is a CLS row whose attention ranks patches."""
    first: int = 0
    """First layer whose rows are numbered so, as where a merger joins rows between two layers."""
    feature_layer: int | None = None
    """Boundary whose rows are handed on, the deepest where features of several are concatenated; `None` is the end."""
    pictures: Callable[[Mapping[str, Any]], Sequence[int]] | None = None
    """For a tower that packs all its rows into one sequence, or pads them: given the arguments, the rows of each
    picture, or of each time step of a video, in order. `None` where every picture is an entry of a batch without
    padding."""
    padded: bool = False
    """Whether every picture is an entry of a batch, padded at its end to the rows of the longest."""
    weights: WeightsOf | None = None
    """Given the same as `members`, the weight that each of them has in its row, in tables of the same shapes, as where
    rows are interpolated; entries of no member are ignored. `None` where all members of a row weigh the same."""

    @property
    def depth(self) -> int:
        """Layers of the tower."""
        return len(listed_layers(self.owner, self.layers))


def listed_layers(owner: Any, name: str) -> Any:
    """The list of layers called `name` in a module; raises `UnsupportedModel` if there is none."""
    if name not in owner._modules:
        raise UnsupportedModel(
            f"vision tower: expected a list of layers {quoted(name)} in {type(owner).__name__}, which has "
            f"{', '.join(owner._modules)}; name the module that holds the list and runs it as `owner`"
        )
    return owner._modules[name]


def feature_boundary(selected: int | Sequence[int], depth: int) -> int:
    """The boundary whose rows a model hands on that selects these of its tower's `depth` + 1 hidden states.

    Entry 0 is the embedding and entry i the output of layer i - 1, so that an entry is a boundary. Of several entries,
    whose features are concatenated, it is the deepest.
    """
    entries = [selected] if isinstance(selected, int) else selected
    if not isinstance(entries, Sequence) or not entries or not all(isinstance(entry, int) for entry in entries):
        raise ValueError(f"feature_boundary: expected a hidden state or several, such as -2, got {quoted(selected)}")
    return max(entry if entry >= 0 else entry + depth + 1 for entry in entries)


def one_to_one(sizes: Sequence[int], prefix: int = 0, kept: int = 0) -> list[Int[Tensor, "rows 1"]]:
    """Members of entries that are one picture each, whose rows reach the LLM one by one.

    `prefix` counts the rows of the tower before the patches, `kept` those of them that become rows of the features.
    """
    if not isinstance(sizes, Iterable):
        raise ValueError(f"one_to_one: expected the number of rows of each entry, such as [576], got {quoted(sizes)}")
    found, first = [], 0
    for size in sizes:
        found.append(torch.arange(first + prefix - kept, first + prefix - kept + size)[:, None])
        first += prefix + size - kept
    return found


def patch_blocks(grid: tuple[int, int], side: int) -> Int[Tensor, "blocks members"]:
    """Numbers of the patches in each `side` x `side` block of a grid, both in raster order.

    Rows and columns after the last whole block belong to none, as in pooling and in pixel shuffles.
    """
    check_grid("patch_blocks", grid)
    rows, columns = grid
    if not isinstance(side, int) or not 1 <= side <= min(rows, columns):
        raise ValueError(f"patch_blocks: expected a side from 1 to {min(rows, columns)}, got {quoted(side)}")
    numbers = torch.arange(rows * columns).view(rows, columns)
    return numbers.unfold(0, side, side).unfold(1, side, side).reshape(-1, side**2)
