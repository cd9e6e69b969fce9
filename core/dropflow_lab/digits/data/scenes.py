"""Scenes: three to nine coloured handwritten digits in a jittered 3 x 3 grid over a darkened photo crop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from dropflow_lab.digits.data.glyphs import SPLITS, Split, check_split, digit_bank, digit_indices, photo_regions, photos

CANVAS = 96
"""Width and height of a scene in pixels."""
CELL = 32
"""Width and height of a grid cell in pixels."""
PATCH = 8
"""Width and height of a patch of the vision tower in pixels."""
PATCHES = (CANVAS // PATCH) ** 2
"""Patches in a scene, hence visual tokens."""
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (255, 60, 50),
    "green": (60, 225, 60),
    "blue": (70, 110, 255),
    "yellow": (250, 230, 50),
    "purple": (230, 70, 235),
    "cyan": (50, 230, 230),
}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
_SMALLEST, _LARGEST = 16, 22
_COVERED = 0.1


@dataclass(frozen=True)
class Item:
    """One digit of a scene, with everything needed to draw it."""

    digit: int
    """Class, 0..9."""
    color: str
    """A key of `COLORS`."""
    row: int
    """Grid row, 0 (top) .. 2 (bottom)."""
    column: int
    """Grid column, 0 (left) .. 2 (right)."""
    source: int
    """Index into `digit_bank()`."""
    left: int
    """Left edge in pixels; the whole digit lies inside its cell."""
    top: int
    """Upper edge in pixels."""
    size: int
    """Width and height in pixels, 16..22."""
    warp: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    """Rotation in radians, shear, horizontal and vertical zoom; the identity outside the train split."""
    tint: tuple[int, int, int] = (0, 0, 0)
    """Offset added to the colour, -15..15 per channel."""


@dataclass(frozen=True)
class Background:
    """A square crop of a photograph, inside the region of the scene's split."""

    photo: int
    left: int
    top: int
    size: int
    brightness: float
    """Factor on the pixel values, 0.3..0.6."""
    mirrored: bool = False


@dataclass(frozen=True)
class Scene:
    """The facts of one picture: its items in reading order, and its background."""

    items: tuple[Item, ...]
    background: Background


def draw_scene(split: str, seed: int | tuple[int, ...], digits: tuple[int, int] = (3, 6)) -> Scene:
    """Draw the scene of (`split`, `seed`), the same one every time.

    `digits` is the smallest and largest number of digits, 1..9; raises `ValueError` outside that range.
    """
    known, (low, high) = check_split(split), digits
    if not 1 <= low <= high <= 9:
        raise ValueError(f"expected 1 <= fewest <= most <= 9 digits in a scene, got {digits}")
    numbers = seed if isinstance(seed, tuple) else (seed,)
    rng = np.random.default_rng([SPLITS.index(known), *numbers])
    count = int(rng.integers(low, high + 1))
    cells = sorted(int(cell) for cell in rng.choice(9, size=count, replace=False))
    return Scene(tuple(_draw_item(rng, known, cell) for cell in cells), draw_background(rng, known))


def _draw_item(rng: np.random.Generator, split: Split, cell: int) -> Item:
    digit = int(rng.integers(10))
    sources = digit_indices(split)[digit]
    size = int(rng.integers(_SMALLEST, _LARGEST + 1))
    row, column = divmod(cell, 3)
    left, top = rng.integers(0, CELL - size + 1, size=2)
    warp, tint = draw_warp(rng, split)
    return Item(
        digit=digit,
        color=tuple(COLORS)[int(rng.integers(len(COLORS)))],
        row=row,
        column=column,
        source=sources[int(rng.integers(len(sources)))],
        left=column * CELL + int(left),
        top=row * CELL + int(top),
        size=size,
        warp=warp,
        tint=tint,
    )


def draw_warp(rng: np.random.Generator, split: Split) -> tuple[tuple[float, float, float, float], tuple[int, int, int]]:
    """Draw an item's warp and tint."""
    red, green, blue = (int(offset) for offset in rng.integers(-15, 16, size=3))
    warp = (0.0, 0.0, 1.0, 1.0)
    if split == "train":
        angle, shear = rng.uniform(-0.22, 0.22), rng.uniform(-0.18, 0.18)
        warp = (float(angle), float(shear), float(rng.uniform(0.85, 1.12)), float(rng.uniform(0.85, 1.12)))
    return warp, (red, green, blue)


def draw_background(rng: np.random.Generator, split: Split) -> Background:
    """Draw a crop that stays inside the split's region of its photo."""
    regions = photo_regions(split)
    region = regions[int(rng.integers(len(regions)))]
    size = int(rng.integers(48, 65))
    return Background(
        photo=region.photo,
        left=int(rng.integers(region.left, region.right - size + 1)),
        top=int(rng.integers(0, photos()[region.photo].shape[0] - size + 1)),
        size=size,
        brightness=float(rng.uniform(0.3, 0.6)),
        mirrored=split == "train" and bool(rng.integers(2)),
    )


def render(scene: Scene) -> tuple[UInt8[np.ndarray, "96 96 3"], Int[np.ndarray, " 144"]]:
    """Render the scene and find which item owns each patch.

    Returns the RGB picture and, per patch in reading order, the index of the item that covers at least a
    tenth of it, or -1 for background.
    """
    canvas = render_items(scene.background, scene.items).round().astype(np.uint8)
    cover = np.zeros((CANVAS, CANVAS), dtype=np.float32)
    owner = np.full((CANVAS // PATCH, CANVAS // PATCH), -1, dtype=np.int64)
    side = CELL // PATCH
    for index, item in enumerate(scene.items):
        box = np.s_[item.top : item.top + item.size, item.left : item.left + item.size]
        cover[box] = _glyph_mask(item)
        owner[item.row * side : (item.row + 1) * side, item.column * side : (item.column + 1) * side] = index
    rows = CANVAS // PATCH
    share = cover.reshape(rows, PATCH, rows, PATCH).mean(axis=(1, 3))
    return canvas, np.where(share >= _COVERED, owner, -1).reshape(-1)


def render_items(background: Background, items: Sequence[Item], side: int = CANVAS) -> Float[np.ndarray, "side side 3"]:
    """Draw items over a background, in RGB of 0..255, not rounded."""
    canvas = _background_pixels(background, side)
    for item in items:
        box = np.s_[item.top : item.top + item.size, item.left : item.left + item.size]
        color = np.clip(np.asarray(COLORS[item.color]) + np.asarray(item.tint), 0, 255).astype(np.float32)
        canvas[box] += _glyph_mask(item)[..., None] * (color - canvas[box])
    return canvas


def _background_pixels(background: Background, side: int) -> Float[np.ndarray, "side side 3"]:
    top, left, size = background.top, background.left, background.size
    crop = Image.fromarray(photos()[background.photo][top : top + size, left : left + size])
    if background.mirrored:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(crop.resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32)
    return pixels * np.float32(background.brightness)


def _glyph_mask(item: Item) -> Float[np.ndarray, "size size"]:
    """Return the opacity 0..1 of the item's strokes, warped about the centre of the digit."""
    glyph = Image.fromarray((digit_bank()[0][item.source] * 255).astype(np.uint8))
    angle, shear, wide, high = item.warp
    cos, sin, step = math.cos(angle), math.sin(angle), 8 / item.size
    across = (step * (cos + shear * sin) / wide, step * (-sin + shear * cos) / high)
    down = (step * sin / wide, step * cos / high)
    middle = item.size / 2
    matrix = (
        across[0], across[1], 4 - (across[0] + across[1]) * middle,
        down[0], down[1], 4 - (down[0] + down[1]) * middle,
    )  # fmt: skip
    warped = glyph.transform((item.size,) * 2, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    opacity = np.asarray(warped, dtype=np.float32) * np.float32(1.3 / 255)
    return opacity.clip(max=1.0)
