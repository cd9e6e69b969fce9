"""Reading pictures."""

from __future__ import annotations

import pytest
from PIL import Image

from dropflow_lab.errors import InputError
from dropflow_lab.images import read_image


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


def test_a_folder_or_nothing_is_refused(tmp_path) -> None:
    for path in (tmp_path, tmp_path / "nothing.png"):
        with pytest.raises(InputError, match="no such image file"):
            read_image(path)
