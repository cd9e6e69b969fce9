"""Sources of the digits data: real handwritten digits and real photographs, in fixed splits.

Both come with scikit-learn, so nothing is downloaded. The split is made on the *sources*: a digit image or
a photo column of the test split is never seen in training, in any scene.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, UInt8

from dropflow.errors import MissingPackage

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

# Shares of every digit class and of the photo columns. Test is large: its scores rest on many images.
DIGIT_SHARES: dict[Split, tuple[float, float]] = {
    "train": (0.0, 0.67),
    "validation": (0.67, 0.78),
    "test": (0.78, 1.0),
}
COLUMN_SHARES: dict[Split, tuple[float, float]] = {
    "train": (0.0, 0.6),
    "validation": (0.6, 0.7),
    "test": (0.7, 1.0),
}
_SPLIT_SEED = 1797


@dataclass(frozen=True)
class PhotoRegion:
    """The columns of one photograph that belong to one split."""

    photo: int
    """Index into `photos()`."""
    left: int
    """First column, in pixels."""
    right: int
    """Column after the last one, in pixels."""


def check_split(split: str) -> Split:
    """Return `split` if it names one of the three splits; raise `ValueError` otherwise."""
    for known in SPLITS:
        if split == known:
            return known
    raise ValueError(f"expected one of the splits {', '.join(SPLITS)}, got {split!r}")


@cache
def digit_bank() -> tuple[Float[np.ndarray, "1797 8 8"], tuple[int, ...]]:
    """Return all digit images in 0..1 and their classes 0..9, in the order of scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing_extra() from error
    data = load_digits()
    return data.images.astype(np.float32) / 16.0, tuple(int(label) for label in data.target)


@cache
def photos() -> tuple[UInt8[np.ndarray, "height width 3"], ...]:
    """Return the photographs china.jpg and flower.jpg, each 427 x 640 pixels."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise _missing_extra() from error
    return tuple(np.asarray(photo) for photo in load_sample_images().images)


@cache
def digit_indices(split: Split) -> dict[int, tuple[int, ...]]:
    """Return, per digit class 0..9, the indices into `digit_bank()` that belong to `split`."""
    labels = np.asarray(digit_bank()[1])
    low, high = DIGIT_SHARES[check_split(split)]
    chosen = {}
    for digit in range(10):
        order = np.random.default_rng([_SPLIT_SEED, digit]).permutation(np.flatnonzero(labels == digit))
        chosen[digit] = tuple(int(i) for i in order[round(low * len(order)) : round(high * len(order))])
    return chosen


@cache
def photo_regions(split: Split) -> tuple[PhotoRegion, ...]:
    """Return the region of every photograph that belongs to `split`; crops must not leave it."""
    low, high = COLUMN_SHARES[check_split(split)]
    widths = [photo.shape[1] for photo in photos()]
    return tuple(PhotoRegion(i, round(low * width), round(high * width)) for i, width in enumerate(widths))


def _missing_extra() -> MissingPackage:
    return MissingPackage(
        "the digits data are made from the images that come with scikit-learn, which is not installed: "
        "pip install 'dropflow[digits]'"
    )
