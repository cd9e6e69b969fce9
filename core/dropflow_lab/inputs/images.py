"""Reads image files, and downsamples pictures: the control that saves tokens by saving pixels."""

from __future__ import annotations

import errno
import io
import math
import os
import re
import warnings
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from dropflow_lab.errors import InputError, shortened

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_ADDRESS = r" <_io\.BytesIO object at \w+>"
"""What Pillow calls bytes in its messages."""


def read_image(path: Path) -> Image.Image:
    """Return the picture in `path` as RGB.

    Raises `InputError` if it is missing, cannot be read, or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if not is_file(path):
        what = "a folder, not an image file; name the pictures in it" if os.path.isdir(path) else "no such image file"
        raise InputError(f"{shortened(str(path))}: {what}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: larger than PIL.Image.MAX_IMAGE_PIXELS allows: {error}; make it smaller") from None
    except Exception as error:  # decoders raise all kinds of errors on malformed bytes
        raise InputError(
            f"{path}: not an image that can be read: {shortened(str(error))}; save it as PNG or JPEG"
        ) from error


def decode_image(data: bytes, most_pixels: int) -> Image.Image:
    """Return the picture that is encoded in `data` as RGB; a moving one as its first frame.

    Raises `InputError` if it is neither PNG, JPEG, WebP nor GIF, cannot be read, or has more than `most_pixels`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            size = image.size
            picture = image.convert("RGB") if size[0] * size[1] <= most_pixels else None
    except Exception as error:  # decoders raise all kinds of errors on malformed bytes
        raise InputError(
            f"expected a PNG, JPEG, WebP or GIF picture, got {len(data):,} bytes that cannot be read as one: "
            f"{shortened(re.sub(_ADDRESS, '', str(error)))}; save it again as PNG or JPEG"
        ) from error
    if picture is None:
        raise InputError(
            f"expected a picture of up to {most_pixels:,} pixels, got {size[0]} x {size[1]}; make it smaller"
        )
    return picture


def is_file(path: Path) -> bool:
    """Whether `path` is a regular file; false for a name that the system rejects, such as one that is too long."""
    try:
        return path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def downsample(image: Image.Image, tokens: int, cell: int) -> Image.Image:
    """Return the picture downsampled to at most `tokens` cells of `cell` x `cell` pixels, near its aspect ratio.

    `cell` is the side of the square that becomes one visual token: the patch size, times the merge size if a family
    merges patches (14 x 2 for Qwen2-VL). What this controls for depends on the backbone:

    - Where a picture keeps its resolution (Qwen2-VL and the like), each cell becomes one token, so that the smaller
      picture actually costs `tokens`. Its processor must not enlarge it again: `tokens` times `cell` squared must be at
      least its smallest number of pixels.
    - Where the encoder has one resolution (CLIP or SigLIP in LLaVA-1.5), the processor enlarges the picture again. The
      model then sees only what `tokens` cells can hold, but computes on as many tokens as before: this controls for
      lost detail, not for saved computation. `control/pool` saves tokens there.
    - Where a picture is cut into tiles (LLaVA-NeXT, InternVL), the same holds for every tile; the number of tokens
      changes in steps of whole tiles.

    A picture that already fits is returned unchanged. Raises `ValueError` below one token or pixel.
    """
    if tokens < 1 or cell < 1:
        raise ValueError(f"downsample: expected tokens and cell of at least 1, got {tokens} and {cell}")
    width, height = image.size
    if max(1, round(width / cell)) * max(1, round(height / cell)) <= tokens:
        return image
    rows, columns = grid_within(image.size, tokens)
    return image.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)


def grid_within(size: tuple[int, int], tokens: int) -> tuple[int, int]:
    """Return rows and columns of at most `tokens` cells for a picture of `size` (width, height), near its aspect ratio.

    Of the integers next to the ideal values, those with the most cells; among equals, those closest to the ratio.
    """
    width, height = size
    ideal = math.sqrt(tokens * height / width), math.sqrt(tokens * width / height)
    if min(ideal) < 1:
        return (1, tokens) if width > height else (tokens, 1)
    near = [(math.floor(side + 1e-9), math.ceil(side - 1e-9)) for side in ideal]
    fits = [(rows, columns) for rows, columns in product(*near) if rows * columns <= tokens]
    return max(fits, key=lambda grid: (grid[0] * grid[1], -abs(math.log(grid[1] * height / (grid[0] * width)))))


def cell_of(config: Any) -> int | None:
    """Return the side in pixels of the square that becomes one visual token; `None` if the config does not say.

    It is the encoder's patch size, times the side of the square of patches that a family merges into one.
    """
    vision = getattr(config, "vision_config", None)
    patch = getattr(vision, "patch_size", None)
    return patch * (getattr(vision, "spatial_merge_size", None) or 1) if isinstance(patch, int) else None
