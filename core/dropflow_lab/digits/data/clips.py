"""Clips: short videos of digits that appear, jump to another place and vanish over one or two darkened photo crops."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dropflow_lab.digits.data.glyphs import SPLITS, Split, check_split, digit_indices
from dropflow_lab.digits.data.scenes import (
    COLORS,
    COLUMNS,
    ROWS,
    Background,
    Item,
    draw_background,
    draw_warp,
    render_items,
)

FRAMES = 8
"""Frames of a clip."""
SIDE = 48
"""Width and height of a frame in pixels: 36 patches, hence 36 visual tokens."""
_CELL = SIDE // 2
_SMALLEST, _LARGEST = 16, 22
_FEWEST, _MOST = 2, 5
_TRIES = 100
"""Places that are drawn for the digits of a clip, most of them free; where the last one finds none, it is left out."""
_NOISE = 2.0
"""Standard deviation of the noise of the camera, in steps of 0..255: no two frames are equal."""


@dataclass(frozen=True)
class Actor:
    """One digit of a clip, with where it is in each frame."""

    item: Item
    """Digit, colour and looks; its place is that of no frame in particular."""
    cells: tuple[int | None, ...]
    """For each frame, the cell of the 2 x 2 grid in raster order, or `None` while the digit is not there."""
    offset: tuple[int, int]
    """Distance in pixels from the left and the upper edge of its cell."""

    @property
    def seen(self) -> list[int]:
        """Frames that show it, in order."""
        return [frame for frame, cell in enumerate(self.cells) if cell is not None]

    def place(self, frame: int) -> str | None:
        """Where it is in a frame, such as `top left`; `None` where it is not."""
        cell = self.cells[frame]
        return None if cell is None else f"{ROWS[2 * (cell // 2)]} {COLUMNS[2 * (cell % 2)]}"

    def item_at(self, frame: int) -> Item | None:
        """What is drawn of it in a frame."""
        cell = self.cells[frame]
        if cell is None:
            return None
        left, top = (cell % 2) * _CELL + self.offset[0], (cell // 2) * _CELL + self.offset[1]
        return replace(self.item, row=cell // 2, column=cell % 2, left=left, top=top)


@dataclass(frozen=True)
class Clip:
    """The facts of one video."""

    actors: tuple[Actor, ...]
    backgrounds: tuple[Background, ...]
    """One for each frame; a cut changes it."""
    noise: int
    """Seed of the noise of the camera."""

    def shown(self, frame: int) -> list[Actor]:
        """Digits that a frame shows."""
        return [actor for actor in self.actors if actor.cells[frame] is not None]


def draw_clip(split: str, seed: int | tuple[int, ...]) -> Clip:
    """Draw the clip of (`split`, `seed`), the same one every time.

    Two to five digits, each in two frames or more without a gap; two in five change their cell once. Half of the clips
    have one cut.
    """
    known = check_split(split)
    rng = np.random.default_rng([SPLITS.index(known), *(seed if isinstance(seed, tuple) else (seed,)), 8])
    free = np.ones((FRAMES, 4), dtype=bool)
    actors: list[Actor] = []
    wanted = int(rng.integers(_FEWEST, _MOST + 1))
    for _ in range(_TRIES):
        if len(actors) == wanted:
            break
        if (cells := _draw_cells(rng, free)) is not None:
            actors.append(_draw_actor(rng, known, cells))
    first, second = draw_background(rng, known), draw_background(rng, known)
    cut = int(rng.integers(2, FRAMES - 1)) if rng.integers(2) else FRAMES
    backgrounds = tuple(_cropped(first if frame < cut else second) for frame in range(FRAMES))
    return Clip(tuple(actors), backgrounds, int(rng.integers(2**31)))


def _draw_cells(rng: np.random.Generator, free: np.ndarray) -> tuple[int | None, ...] | None:
    """Draw where a digit is in each frame, and take its cells; `None` if one of them is taken."""
    length = int(rng.integers(2, FRAMES + 1))
    start = int(rng.integers(0, FRAMES - length + 1))
    before, after = (int(cell) for cell in rng.choice(4, size=2, replace=False))
    jump = int(rng.integers(start + 1, start + length)) if rng.random() < 0.4 else start + length
    taken = {frame: before if frame < jump else after for frame in range(start, start + length)}
    if not all(free[frame, cell] for frame, cell in taken.items()):
        return None
    for frame, cell in taken.items():
        free[frame, cell] = False
    return tuple(taken.get(frame) for frame in range(FRAMES))


def _draw_actor(rng: np.random.Generator, split: Split, cells: tuple[int | None, ...]) -> Actor:
    digit, size = int(rng.integers(10)), int(rng.integers(_SMALLEST, _LARGEST + 1))
    sources = digit_indices(split)[digit]
    warp, tint = draw_warp(rng, split)
    item = Item(
        digit=digit,
        color=tuple(COLORS)[int(rng.integers(len(COLORS)))],
        row=0,
        column=0,
        source=sources[int(rng.integers(len(sources)))],
        left=0,
        top=0,
        size=size,
        warp=warp,
        tint=tint,
    )
    left, top = rng.integers(0, _CELL - size + 1, size=2)
    return Actor(item, cells, (int(left), int(top)))


def _cropped(background: Background) -> Background:
    """The same crop for a smaller picture: as many pixels of the photo for each pixel of the frame."""
    return replace(background, size=background.size // 2)


def render_clip(clip: Clip) -> UInt8[np.ndarray, "8 48 48 3"]:
    """Render all frames in RGB."""
    return np.stack([_render(clip, frame) for frame in range(FRAMES)])


def frame_of(clip: Clip, frame: int) -> Image.Image:
    """Render one frame as a picture."""
    return Image.fromarray(_render(clip, frame))


def _render(clip: Clip, frame: int) -> UInt8[np.ndarray, "48 48 3"]:
    items = [item for actor in clip.actors if (item := actor.item_at(frame)) is not None]
    pixels = render_items(clip.backgrounds[frame], items, SIDE)
    noise = np.random.default_rng(clip.noise).normal(0.0, _NOISE, (FRAMES, *pixels.shape))
    noisy: UInt8[np.ndarray, "48 48 3"] = (pixels + noise[frame]).clip(0, 255).round().astype(np.uint8)
    return noisy
