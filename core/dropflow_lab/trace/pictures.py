"""The pictures that a page shows: what the model saw, resized and cropped, small enough to be embedded."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dropflow_lab.inputs.prompts import build_inputs

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 448
"""Longest side of an embedded picture, in pixels."""
BUDGET = 90_000
"""Bytes that all pictures of a page may take, encoded."""


def seen_pictures(processor: Any, pictures: Sequence[Image], question: str, images: int) -> list[Image | None]:
    """Return one picture, or `None`, for each of the `images` images of the prompt.

    They are made from the processor's `pixel_values` if these have one entry per image, so that resizing and cropping
    are visible; otherwise they are the given pictures, if there are as many.
    """
    made = _from_pixels(processor, build_inputs(processor, [(pictures, question)]).get("pixel_values"), images)
    if made is not None:
        return made
    return list(pictures) if len(pictures) == images else [None] * images


def data_uris(pictures: Sequence[Image | None]) -> list[str | None]:
    """Return each picture as a data URI; all of them together fit `BUDGET`."""
    each = BUDGET // max(len(pictures), 1)
    return [None if picture is None else _data_uri(picture, each) for picture in pictures]


def _from_pixels(processor: Any, pixels: Any, images: int) -> list[Image | None] | None:
    from PIL import Image

    own = getattr(processor, "image_processor", None)
    mean, std = getattr(own, "image_mean", None), getattr(own, "image_std", None)
    if pixels is None or mean is None or std is None or pixels.dim() < 4:
        return None
    tiles = pixels.detach().float().cpu().flatten(0, -4).numpy()  # (images, channels, height, width)
    if len(tiles) != images or tiles.shape[1] != 3:
        return None
    values = tiles.transpose(0, 2, 3, 1) * np.array(std) + np.array(mean)
    return [Image.fromarray((tile.clip(0, 1) * 255).round().astype("uint8")) for tile in values]


def _data_uri(picture: Image, budget: int) -> str:
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    data, kind = _encoded(small, "PNG"), "png"
    quality = 85
    while len(data) * 4 / 3 > budget and quality > 5:
        data, kind = _encoded(small, "JPEG", quality=quality), "jpeg"
        quality -= 15
        small = small if quality > 40 else small.resize((max(small.width * 3 // 4, 1), max(small.height * 3 // 4, 1)))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _encoded(picture: Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, optimize=True, **options)
    return buffer.getvalue()
