"""Reading pictures, and making them smaller."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dropflow_lab.errors import InputError
from dropflow_lab.inputs.images import downsample, grid_within, read_image


def test_any_mode_is_read_as_rgb(tmp_path) -> None:
    Image.new("RGBA", (3, 2), (10, 20, 30, 255)).save(tmp_path / "clear.png")
    picture = read_image(tmp_path / "clear.png")
    assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (3, 2), (10, 20, 30))


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\nbroken"])
def test_what_is_no_picture_is_refused(tmp_path, content) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.png: not an image"):
        read_image(path)


def test_a_cut_off_picture_is_refused(tmp_path) -> None:
    Image.effect_noise((40, 40), 50).save(tmp_path / "whole.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    with pytest.raises(InputError, match=r"cut\.png: not an image"):
        read_image(cut)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (12_000, 12_000)).save(path)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("unpacked"))
    for limit in (None, 12_000 * 6_000 - 1):  # twice the limit is an error of Pillow's, too
        if limit is not None:
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match=r"bomb\.png: larger than PIL\.Image\.MAX_IMAGE_PIXELS allows") as refused:
            read_image(path)
        assert "\n" not in str(refused.value)


def test_whatever_a_decoder_raises_is_one_line(tmp_path, monkeypatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for error in (EOFError("a\nb"), KeyError("x"), MemoryError(), struct.error("short"), IndexError()):

        def fails(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Image.Image, "convert", fails)
        with pytest.raises(InputError, match=r"a\.png: not an image that can be read") as refused:
            read_image(tmp_path / "a.png")
        assert "\n" not in str(refused.value)


def test_a_folder_or_nothing_is_refused(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="a folder, not an image file; name the pictures in it"):
        read_image(tmp_path)
    for path in (tmp_path / "nothing.png", tmp_path / ("x" * 5_000), tmp_path / "pipe.png"):
        with pytest.raises(InputError, match="no such image file"):
            read_image(path)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 3000))
def test_a_grid_uses_the_tokens_it_may_and_keeps_the_ratio(width: int, height: int, tokens: int) -> None:
    rows, columns = grid_within((width, height), tokens)
    assert min(rows, columns) >= 1
    assert rows * columns <= tokens
    ideal = (tokens * height / width) ** 0.5, (tokens * width / height) ** 0.5
    if min(ideal) >= 1:
        assert abs(rows - ideal[0]) < 1
        assert abs(columns - ideal[1]) < 1


@pytest.mark.parametrize(
    ("size", "tokens", "grid"),
    [((336, 336), 144, (12, 12)), ((640, 480), 100, (9, 11)), ((480, 640), 100, (11, 9)), ((5000, 20), 7, (1, 7))],
)
def test_grids_that_can_be_checked_by_hand(size: tuple[int, int], tokens: int, grid: tuple[int, int]) -> None:
    assert grid_within(size, tokens) == grid


@pytest.mark.parametrize("tokens", [6, 12, 50])
def test_a_smaller_picture_really_costs_fewer_tokens_where_resolution_is_kept(tokens: int) -> None:
    processor = Qwen2VLImageProcessorPil()
    cell = processor.patch_size * processor.merge_size
    picture = Image.effect_noise((336, 252), 80).convert("RGB")
    smaller = downsample(picture, tokens, cell)
    rows, columns = grid_within(picture.size, tokens)
    grid = processor(images=[smaller], return_tensors="pt")["image_grid_thw"][0].tolist()
    assert grid == [1, rows * processor.merge_size, columns * processor.merge_size]
    assert 0.7 * tokens <= rows * columns <= tokens


def test_a_picture_that_is_small_already_is_left_alone() -> None:
    picture = Image.effect_noise((84, 56), 80)
    assert downsample(picture, 6, 28) is picture
    assert downsample(picture, 5, 28).size == (56, 56)
    with pytest.raises(ValueError, match="tokens and cell of at least 1, got 0 and 28"):
        downsample(picture, 0, 28)
