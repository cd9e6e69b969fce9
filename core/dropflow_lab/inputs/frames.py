"""Videos as folders of frames, and what a batch of prompts says about which of its pictures are frames."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

import dropflow
from dropflow_lab.errors import InputError, shortened

if TYPE_CHECKING:
    from dropflow_lab.inputs.data import Sample

_SHOWN = 3


def frame_files(folder: Path, name: str, root: Path) -> list[Path]:
    """Return the frames in a folder in the order of their names, with numbers in names as numbers (`f2` before `f10`).

    Hidden files are passed over. `name` is what the data calls the folder, `root` where it was looked for. Raises
    `ValueError` for a folder that is missing or has no files, holds something else than pictures that can be read, or
    pictures of several sizes.
    """
    if not folder.is_dir():
        raise ValueError(f"video: no folder {shortened(repr(name))} in {root}; a video is a folder of frames")
    found = sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=_natural)
    if not found:
        raise ValueError(f"video: {shortened(repr(name))} has no frames; save each as a picture, named in their order")
    sizes = {path: _size(path, name) for path in found}
    first = found[0]
    if other := next((path for path in found if sizes[path] != sizes[first]), None):
        shown = (f"{path.name} of {sizes[path][0]} x {sizes[path][1]}" for path in (first, other))
        raise ValueError(
            f"video: expected frames of one size in {shortened(repr(name))}, got {' and '.join(shown)}; resize them"
        )
    return found


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """A key that sorts runs of digits by their value."""
    parts = re.split(r"(\d+)", path.name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _size(path: Path, name: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # decoders raise all kinds of errors on malformed files
        raise ValueError(
            f"video: {shortened(repr(path.name))} in {shortened(repr(name))} is not a picture that can be read; keep "
            "only frames in the folder, as PNG or JPEG"
        ) from error


def stating_videos(inputs: Any, samples: Sequence[Sample]) -> AbstractContextManager[None]:
    """State which pictures of a batch of prompts are frames of which video; a no-op where no sample has a video.

    Raises `InputError` where the model's processor does not make exactly one image of each picture, such as a picture
    that it cuts into tiles: numbers of frames would then mean other images.
    """
    if not any(sample.videos for sample in samples):
        return nullcontext()
    frames, start = [], 0
    for sample in samples:
        frames += [[start + number for number in video] for video in sample.videos]
        start += len(sample.pictures)
    made = _images(inputs)
    if made != start:
        told = "an unknown number of" if made is None else str(made)
        raise InputError(
            f"videos: expected one image for each of {start} frames and pictures, got {told} from the model's "
            "processor; make it pass frames on whole, without cutting them into tiles"
        )
    return dropflow.videos(frames)


def _images(inputs: Any) -> int | None:
    """How many images a processor made: by their grids where patches are packed, else by their pixels."""
    grids, pixels = inputs.get("image_grid_thw"), inputs.get("pixel_values")
    if grids is not None:
        return len(grids)
    if pixels is None or pixels.dim() not in (4, 5):
        return None
    return int(pixels.shape[:-3].numel())  # (images, 3, height, width) or (pictures, tiles, 3, height, width)
