"""Scenes repeat from their seed, and the patch owners agree with what is drawn."""

import numpy as np
import pytest

from dropflow_lab.digits.data.scenes import CELL, COLORS, PATCH, draw_scene, render


def test_same_seed_same_scene_and_pixels():
    for split in ("train", "test"):
        first, second = draw_scene(split, 5), draw_scene(split, 5)
        assert first == second
        np.testing.assert_array_equal(render(first)[0], render(second)[0])


def test_seed_and_split_change_the_scene():
    assert draw_scene("test", 5) != draw_scene("test", 6)
    assert draw_scene("test", 5).items != draw_scene("validation", 5).items


def test_number_of_digits_covers_the_range_asked_for():
    assert {len(draw_scene("test", seed).items) for seed in range(60)} == {3, 4, 5, 6}
    assert {len(draw_scene("test", seed, (9, 9)).items) for seed in range(5)} == {9}


@pytest.mark.parametrize("digits", [(0, 3), (5, 4), (3, 10)])
def test_impossible_numbers_of_digits_are_refused(digits):
    with pytest.raises(ValueError, match="1 <= fewest <= most <= 9"):
        draw_scene("test", 0, digits)


def test_items_lie_in_their_cell_in_reading_order():
    for seed in range(100):
        items = draw_scene("train", seed, (3, 9)).items
        cells = [3 * item.row + item.column for item in items]
        assert cells == sorted(set(cells))
        for item in items:
            assert 16 <= item.size <= 22
            assert item.column * CELL <= item.left <= (item.column + 1) * CELL - item.size
            assert item.row * CELL <= item.top <= (item.row + 1) * CELL - item.size


def test_every_item_owns_patches_of_its_color():
    for seed in range(60):
        scene = draw_scene("test", seed)
        pixels, owner = render(scene)
        assert pixels.shape == (96, 96, 3)
        assert owner.shape == (144,)
        assert set(owner[owner >= 0]) == set(range(len(scene.items)))
        for index, item in enumerate(scene.items):
            rows, columns = np.divmod(np.flatnonzero(owner == index), 96 // PATCH)
            patches = [
                pixels[r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH].reshape(-1, 3)
                for r, c in zip(rows, columns, strict=True)
            ]
            strokes = np.concatenate(patches).astype(int)
            distance = {
                name: np.sort(np.abs(strokes - np.asarray(color)).sum(1))[:8].mean() for name, color in COLORS.items()
            }
            assert min(distance, key=distance.get) == item.color
