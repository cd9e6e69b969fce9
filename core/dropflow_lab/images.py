"""Reads image files."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dropflow_lab.errors import InputError


def read_image(path: Path) -> Image.Image:
    """Return the picture in `path` as RGB; raises `InputError` where there is none that can be read."""
    if not path.is_file():
        raise InputError(f"{path}: no such image file")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not an image that can be read: {error}") from None
