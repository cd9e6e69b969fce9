"""Result files: whole or not at all, and never outside of their folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dropflow_lab.files import file_name, naming_what_cannot_be_written, replacing, replacing_files, write_text


def test_plain_names_stay_and_others_become_plain() -> None:
    assert [file_name(name) for name in ("hidrop-64", "a.b_c")] == ["hidrop-64", "a.b_c"]
    odd = ("../../x", "a/b", "a_b/", ".hidden", "", "x" * 101, "a\nb", "a b", "\\", "nul\0")
    found = [file_name(name) for name in odd]
    assert len(set(found)) == len(odd)
    for name in found:
        assert name.isascii()
        assert len(name) <= 110
        assert not set(name) & set("/\\\n \0")
        assert not name.startswith(".")


def test_a_file_is_replaced_when_it_is_whole(tmp_path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old")
    with pytest.raises(TypeError), replacing(path) as part:
        part.write_text(b"half")  # raises once the file is open
    assert path.read_text() == "old"
    with replacing(path) as part:
        assert (part.suffix, part.parent) == (".txt", path.parent)
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_links_and_pipes_are_written_to_as_they_are(tmp_path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "text")
    assert os.read(reader, 9) == b"text"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_errors_name_the_file(tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / ("x" * 300), tmp_path / "folder" / ("x" * 300) / "a"):
        with pytest.raises(OSError, match=r"Is a directory|File name too long") as refused:
            write_text(path, "text")
        assert refused.value.filename
    refused = cannot_write(tmp_path, OSError, "I/O error: No space left on device (os error 28)")
    assert (refused.errno, refused.filename) == (28, str(tmp_path))
    cannot_write(tmp_path, RuntimeError, "something else")


def cannot_write(folder: Path, expected: type[Exception], said: str) -> Any:
    """What becomes of an error of safetensors or torch that says so."""
    with pytest.raises(expected) as refused, naming_what_cannot_be_written(folder):
        raise RuntimeError(said)
    return refused.value


def test_a_folder_of_files_is_replaced_when_all_are_whole(tmp_path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "other").write_text("other")
    with pytest.raises(TypeError), replacing_files(tmp_path) as part:
        (part / "a").write_text(b"half")  # raises once the file is open
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "other": "other"}
    (tmp_path / ".part").mkdir()
    (tmp_path / ".part" / "stray").write_text("left by a kill")
    with replacing_files(tmp_path) as part:
        (part / "a").write_text("new")
        (part / "b").write_text("b")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "b", "other": "other"}


def test_a_folder_that_is_missing_is_made(tmp_path: Path) -> None:
    with replacing_files(tmp_path / "new" / "folder") as part:
        (part / "a").write_text("a")
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["a"]
