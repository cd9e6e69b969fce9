"""Videos: which images of a call are frames of which video, as callers state it where processors do not tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral
from types import MappingProxyType
from typing import Any, Literal

from dropflow.errors import UnsupportedCall, quoted

Frames = tuple[tuple[int, ...], ...]
"""For each video, the numbers of its frames among the images of a call of the encoder, in the order of time."""

_NOTHING: Mapping[str, Frames | None] = MappingProxyType({})
_stated: ContextVar[Mapping[str, Frames | None]] = ContextVar("dropflow_videos", default=_NOTHING)


@contextmanager
def videos(frames: Sequence[Sequence[int]], modality: Literal["image", "video"] = "image") -> Iterator[None]:
    """State the videos of the prompts that this thread runs inside the block, for stages with `reads_videos`.

    One list for each video of the batch: the numbers of its frames among the images that the batch brings as
    `modality`, in the order of time. Images (pictures, tiles, frames) are numbered from 0 in the order of their pixels,
    over all samples; those in no list are pictures, so that `[]` says that there is no video. Where `generate` repeats
    samples, such as for beams, state those of the samples once. Needed where processors hand over frames as images, as
    those of InternVL and SmolVLM do; adapters know the videos of other calls. A thread started inside the block does
    not see them. Raises `ValueError` for a frame without number or named twice, and for a video without frames.
    """
    given = tuple(frames) if isinstance(frames, Iterable) else (frames,)
    own = tuple(tuple(video) if isinstance(video, Iterable) else () for video in given)
    numbers: list[Any] = [number for video in own for number in video]
    counted = all(isinstance(number, Integral) and int(number) >= 0 for number in numbers)
    if not all(own) or not counted or len(set(numbers)) < len(numbers):
        raise ValueError(
            "videos: expected one list of frames for each video, with numbers from 0 of which none appears twice, such "
            f"as [[0, 1, 2], [4, 5]], got {quoted(frames)}"
        )
    with _stating({modality: own}):
        yield


@contextmanager
def every_image_a_video() -> Iterator[None]:
    """State that every image is a video of one frame, whatever the prompts; for the conformance kit."""
    with _stating({"image": None, "video": None}):
        yield


@contextmanager
def _stating(frames: Mapping[str, Frames | None]) -> Iterator[None]:
    token = _stated.set({**_stated.get(), **frames})
    try:
        yield
    finally:
        _stated.reset(token)


def are_stated(modality: str) -> bool:
    """Whether this thread states the videos among the images of a modality."""
    return modality in _stated.get()


def stated_videos(modality: str, images: int) -> Frames:
    """The videos that this thread states among `images` images; raises `UnsupportedCall` for a frame that is not there.

    Ask only where they `are_stated`.
    """
    frames = _stated.get()[modality]
    if frames is None:
        return tuple((number,) for number in range(images))
    last = max((number for video in frames for number in video), default=-1)
    if last >= images:
        raise UnsupportedCall(
            f"videos: frame {last} stated, but this call has {images} images of modality {modality!r}; number its "
            "pictures, tiles and frames from 0 in the order of their pixels"
        )
    return frames
