"""Pictures cut into tiles, as in LLaVA-NeXT: which patches the joined and unpadded tiles hold, and those of frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tiles = Callable[[Tensor], Tensor]
"""Numbers (rows, columns) of the joined tiles' patches -> (rows, columns, members), what their tokens are made of."""


def tiles_of(config: Any, height_width: Any) -> tuple[int, int]:
    """Tiles from top to bottom and from left to right of a picture of this size in pixels."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    down, across = get_anyres_image_grid_shape(
        height_width, config.image_grid_pinpoints, config.vision_config.image_size
    )
    return int(down), int(across)


def unpadded(config: Any, height_width: Any, device: str = "cpu") -> Tensor:
    """Numbers (rows, columns) of the patches of the joined tiles, after the model's own unpadding.

    They are counted through an image's pictures: its overview, then tile by tile.
    """
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    (down, across), side = tiles_of(config, height_width), patches_per_side(config)
    numbers = torch.arange(side**2, (1 + down * across) * side**2, device=device)
    joined = numbers.view(down, across, side, side).transpose(1, 2).reshape(1, down * side, across * side)
    kept: Tensor = unpad_image(joined, height_width)[0]
    return kept


def patches_per_side(config: Any) -> int:
    """Patches along one side of a tile."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def image_members(config: Any, sizes: Sequence[int], height_widths: Any, prefix: int, tiles: Tiles) -> list[Tensor]:
    """Members of each image: its overview, then the joined tiles with a newline after every row.

    An image of one tile is an overview with one newline.
    """
    side, found, first = patches_per_side(config), [], 0
    overview = torch.arange(side**2)[:, None]
    for size, height_width in zip(sizes, height_widths, strict=True):
        table = _image_table(config, size, height_width, overview, tiles)
        found.append(_in_tower(table + first * side**2 * (table >= 0), side, prefix))
        down, across = (0, 0) if size == len(overview) + 1 else tiles_of(config, height_width)
        first += 1 + down * across
    return found


def image_weights(config: Any, sizes: Sequence[int], height_widths: Any, tiles: Tiles) -> list[Tensor]:
    """Weights of `image_members`, where `tiles` gives those of the joined tiles' tokens; -1 for newlines."""
    overview = torch.ones(patches_per_side(config) ** 2, 1)
    pairs = zip(sizes, height_widths, strict=True)
    return [_image_table(config, size, height_width, overview, tiles) for size, height_width in pairs]


def _image_table(config: Any, size: int, height_width: Any, overview: Tensor, tiles: Tiles) -> Tensor:
    """What an image's tokens are made of, from what its `overview` is and its joined `tiles` are."""
    if size == len(overview) + 1:
        return _extended(overview, rows=1)
    own = tiles(unpadded(config, height_width))
    lines = torch.cat((own, torch.full_like(own[:, :1], -1)), 1).flatten(0, 1)
    return torch.cat((_extended(overview, columns=lines.shape[1] - 1), lines))


def frame_members(frame: Tensor, config: Any, sizes: Sequence[int], prefix: int) -> list[Tensor]:
    """Members of each video, frame after frame, from those of one `frame` (tokens, members); then newlines, if any."""
    side, found, first = patches_per_side(config), [], 0
    for size in sizes:
        frames = range(first, first + size // len(frame))
        table = torch.cat([torch.where(frame >= 0, frame + number * side**2, -1) for number in frames])
        found.append(_in_tower(_extended(table, rows=size - len(table)), side, prefix))
        first = frames.stop
    return found


def frame_weights(frame: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Weights of `frame_members`, from those of one `frame` (tokens, members); -1 for newlines."""
    return [_extended(frame.repeat(size // len(frame), 1), rows=size % len(frame)) for size in sizes]


def _extended(table: Tensor, *, rows: int = 0, columns: int = 0) -> Tensor:
    return torch.nn.functional.pad(table, (0, columns, 0, rows), value=-1)


def _in_tower(table: Tensor, side: int, prefix: int) -> Tensor:
    """Numbers of patches as numbers of the tower's rows, of which `prefix` come before the patches of each picture."""
    return torch.where(table >= 0, table + prefix * (1 + table // side**2), -1)
