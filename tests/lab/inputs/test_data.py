"""Questions about pictures, from a folder or the embedded ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dropflow_lab.digits.data.dataset import examples
from dropflow_lab.errors import InputError
from dropflow_lab.inputs.data import Sample, read_samples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two pictures, of different size, and no questions yet."""
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 6), 200).save(tmp_path / "images" / "a.png")
    Image.new("RGB", (5, 5), "red").save(tmp_path / "images" / "b.png")
    return tmp_path


def write(folder: Path, *lines: Any, name: str = "data.jsonl") -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / name).write_text("\n".join(texts) + "\n")


def test_one_picture_or_several_and_answers_that_may_be_missing(folder) -> None:
    write(
        folder,
        {"image": "images/a.png", "question": "what ?", "answer": "grey", "kind": "color", "id": 7},
        "",
        {"images": ["a.png", "b.png"], "question": "which ?", "answer": None},
        {"image": "b.png", "question": "who ?"},
    )
    first, second, third = read_samples(folder, 10)
    assert (first.question, first.answer, first.kind) == ("what ?", "grey", "color")
    assert [image.size for image in second.images()] == [(8, 6), (5, 5)]
    assert {image.mode for image in second.images()} == {"RGB"}
    assert (second.answer, third.answer, third.kind) == (None, None, None)
    assert first.pictures[0].name == second.pictures[0].name != third.pictures[0].name


def test_no_more_lines_are_read_than_asked_for(folder) -> None:
    write(folder, {"image": "a.png", "question": "1"}, {"image": "b.png", "question": "2"}, "broken")
    assert [sample.question for sample in read_samples(folder, 2)] == ["1", "2"]


def test_a_picture_is_opened_when_it_is_asked_for(folder) -> None:
    (folder / "images" / "broken.png").write_text("no picture")
    write(folder, {"image": "broken.png", "question": "1"})
    (sample,) = read_samples(folder, 1)
    with pytest.raises(InputError, match=r"broken\.png: not an image"):
        sample.images()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{broken", "expected a JSON object"),
        ([1, 2], "line: input should be a valid dictionary"),
        ({"image": "a.png"}, "question: field required"),
        ({"image": "a.png", "question": ""}, "question: string should have at least 1 character"),
        ({"question": "what ?"}, "image: missing; name a file, or several in `images`"),
        ({"image": "c.png", "question": "what ?"}, "image: no file 'c.png' in"),
        ({"images": "a.png", "question": "what ?"}, "images: input should be a valid list"),
        ({"image": "a.png", "question": "what ?", "answer": 7}, "answer: input should be a valid string"),
        ('{"image": "a.png", "question": NaN}', "question: input should be a valid string"),
        ('{"image": "a.png", "question": "\\ud800"}', "question: input should be a valid string"),
        ('{"image": "a.png", "question": ' + "9" * 5_000 + "}", "expected a JSON object: Exceeds the limit"),
        ("[" * 100_000, "expected a JSON object"),
        ('{"question":' * 5_000, "expected a JSON object"),
        ({"image": "x" * 5_000, "question": "what ?"}, "image: no file 'xxx"),
        ({"image": "a\0b", "question": "what ?"}, "image: no file 'a\\x00b' in"),
        ({"image": "pipe", "question": "what ?"}, "image: no file 'pipe' in"),
        ({"image": "/etc/passwd", "question": "what ?"}, "image: '/etc/passwd' leads out of"),
        ({"image": "images/../../a.png", "question": "what ?"}, "image: 'images/../../a.png' leads out of"),
    ],
)
def test_a_faulty_line_is_named_with_file_and_number(folder, line, expected) -> None:
    os.mkfifo(folder / "images" / "pipe")
    write(folder, {"image": "a.png", "question": "fine"}, "", line)
    with pytest.raises(InputError) as refused:
        read_samples(folder, 10)
    assert str(refused.value).startswith(f"{folder / 'data.jsonl'}:3: {expected}")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_all_faulty_lines_are_named_up_to_ten(folder) -> None:
    write(folder, *["broken"] * 12)
    with pytest.raises(InputError) as refused:
        read_samples(folder, 100)
    lines = str(refused.value).splitlines()
    assert [line.split(":")[1] for line in lines[:10]] == [str(number) for number in range(1, 11)]
    assert lines[10:] == [f"{folder / 'data.jsonl'}: 2 more faulty lines"]


def test_folders_without_one_data_file(folder, tmp_path) -> None:
    with pytest.raises(InputError, match="found no such folder"):
        read_samples(tmp_path / "missing", 1)
    with pytest.raises(InputError, match=r"expected data\.jsonl or one other \.jsonl file, found none"):
        read_samples(folder, 1)
    write(folder, name="a.jsonl")
    with pytest.raises(InputError, match=r"a\.jsonl: expected at least one line"):
        read_samples(folder, 1)
    write(folder, name="b.jsonl")
    with pytest.raises(InputError, match=r"found a\.jsonl, b\.jsonl"):
        read_samples(folder, 1)
    write(folder, {"image": "a.png", "question": "this one ?"})
    assert read_samples(folder, 1)[0].question == "this one ?"


def test_what_is_no_file_is_not_read(folder) -> None:
    os.mkfifo(folder / "data.jsonl")
    (folder / "b.jsonl").mkdir()
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    with pytest.raises(InputError, match="found none"):
        read_samples(folder, 1)


def test_links_are_followed(folder, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "c.png"
    (folder / "images" / "a.png").rename(elsewhere)
    (folder / "images" / "c.png").symlink_to(elsewhere)
    write(folder, {"image": "c.png", "question": "what ?"})
    (sample,) = read_samples(folder, 1)
    assert sample.images()[0].size == (8, 6)
    assert sample.where == f"{folder / 'data.jsonl'}:1"


def test_a_file_in_another_encoding(folder) -> None:
    (folder / "data.jsonl").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(InputError, match="expected UTF-8"):
        read_samples(folder, 1)


def test_the_digits_questions_are_those_of_the_test_split() -> None:
    drawn = list(examples("test", 5, 3))
    for sample, example in zip(read_samples("digits", 5, 3), drawn, strict=True):
        assert (sample.question, sample.answer, sample.kind) == (example.question, example.answer, example.kind)
        assert sample.images()[0].tobytes() == example.image.tobytes()


def test_an_answer_is_right_whatever_its_case_spacing_and_full_stop() -> None:
    sample = Sample((), "what ?", "left of  it")
    assert sample.is_answered_by(" Left of it. ")
    assert not sample.is_answered_by("left")
    assert not Sample((), "what ?").is_answered_by("")
