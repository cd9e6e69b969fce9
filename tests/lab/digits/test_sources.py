"""The three splits share no digit image and no photo column."""

import numpy as np
import pytest

from dropflow_lab.digits.data.glyphs import SPLITS, digit_bank, digit_indices, photo_regions, photos
from dropflow_lab.digits.data.scenes import draw_scene


def _all_digits(split: str) -> set[int]:
    return {index for indices in digit_indices(split).values() for index in indices}


def test_splits_share_no_digit_image_and_lose_none():
    parts = [_all_digits(split) for split in SPLITS]
    assert set.union(*parts) == set(range(1797))
    assert sum(len(part) for part in parts) == 1797
    assert [len(part) for part in parts] == [1205, 197, 395]


def test_splits_share_no_identical_pixels():
    images = digit_bank()[0]
    pixels = {split: {images[i].tobytes() for i in _all_digits(split)} for split in SPLITS}
    assert not pixels["train"] & pixels["test"]
    assert not pixels["train"] & pixels["validation"]
    assert not pixels["validation"] & pixels["test"]


def test_indices_are_of_the_class_they_are_listed_under():
    labels = digit_bank()[1]
    for split in SPLITS:
        for digit, indices in digit_indices(split).items():
            assert {labels[index] for index in indices} == {digit}


def test_photo_regions_share_no_column():
    for photo, pixels in enumerate(photos()):
        regions = sorted(
            (region.left, region.right) for split in SPLITS for region in photo_regions(split) if region.photo == photo
        )
        assert regions == [(0, 384), (384, 448), (448, 640)]
        assert pixels.shape == (427, 640, 3)


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_stay_inside_their_split(split):
    digits, regions = _all_digits(split), photo_regions(split)
    for seed in range(300):
        scene = draw_scene(split, seed)
        assert {item.source for item in scene.items} <= digits
        crop = scene.background
        region = regions[crop.photo]
        assert region.left <= crop.left <= region.right - crop.size
        assert 0 <= crop.top <= photos()[crop.photo].shape[0] - crop.size


def test_only_training_digits_are_warped():
    plain = (0.0, 0.0, 1.0, 1.0)
    assert all(item.warp == plain for seed in range(50) for item in draw_scene("test", seed).items)
    assert all(item.warp != plain for seed in range(50) for item in draw_scene("train", seed).items)


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'dropflow\[digits\]'$"):
        digit_bank.__wrapped__()


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="train, validation, test, got 'tset'"):
        draw_scene("tset", 0)


def test_digit_bank_is_scaled_to_one():
    images, labels = digit_bank()
    assert (images.min(), images.max(), images.dtype) == (0.0, 1.0, np.float32)
    assert labels[:10] == tuple(range(10))
