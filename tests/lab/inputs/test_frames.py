"""Videos in data: folders of frames, in the order of their names, and stated to the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import dropflow
from dropflow import Encode, EncodeCall, Stage, hookimpl
from dropflow_lab.compare.answers import ask
from dropflow_lab.compare.compare import Comparing, Rules
from dropflow_lab.digits.checkpoints.changes import build_clip_processor, start_clips
from dropflow_lab.digits.data.clip_folder import write_clips
from dropflow_lab.errors import InputError
from dropflow_lab.inputs.data import read_samples
from dropflow_lab.inputs.frames import stating_videos
from dropflow_lab.inputs.prompts import build_inputs
from dropflow_lab.store.finished import Finished

ASKED = {"question": "?"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A picture, and a video of three frames whose names sort otherwise as text."""
    Image.new("RGB", (5, 5), "red").save(tmp_path / "a.png")
    (tmp_path / "videos" / "cat").mkdir(parents=True)
    for number in (10, 9, 1):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(tmp_path / "videos" / "cat" / f"f{number}.png")
    (tmp_path / "videos" / "cat" / ".hidden").write_text("")
    return tmp_path


def write(folder: Path, *lines: Any) -> None:
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_frames_come_in_the_order_of_their_names_after_the_pictures(folder) -> None:
    write(
        folder, {"image": "a.png", "videos": ["cat", "videos/cat"], "question": "?"}, {"video": "cat", "question": "?"}
    )
    both, alone = read_samples(folder, 2)
    assert both.videos == ((1, 2, 3), (4, 5, 6))
    assert [image.getpixel((0, 0))[0] for image in both.images()] == [255, 1, 9, 10, 1, 9, 10]
    assert alone.videos == ((0, 1, 2),)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("dog", "no folder 'dog'"),
        ("a.png", "a video is a folder of frames"),
        ("empty", "'empty' has no frames"),
        ("text", "'notes.txt' in 'text' is not a picture"),
        ("nested", "'sub' in 'nested' is not a picture"),
        ("sizes", "expected frames of one size in 'sizes', got 1.png of 4 x 4 and 2.png of 4 x 5"),
        ("../cat", "leads out of"),
    ],
)
def test_folders_that_are_no_video(folder, name, told) -> None:
    videos = folder / "videos"
    (videos / "empty").mkdir()
    (videos / "nested" / "sub").mkdir(parents=True)
    (videos / "text").mkdir()
    (videos / "text" / "notes.txt").write_text("frames of a cat")
    (videos / "sizes").mkdir()
    Image.new("RGB", (4, 4)).save(videos / "sizes" / "1.png")
    Image.new("RGB", (4, 5)).save(videos / "sizes" / "2.png")
    write(folder, {"video": "cat", "question": "?"}, {"video": name, "question": "?"})
    with pytest.raises(InputError, match=r"data\.jsonl:2: video: ") as caught:
        read_samples(folder, 2)
    assert told in str(caught.value)


def test_a_line_without_anything_to_see_names_all_that_it_may_have(folder) -> None:
    write(folder, {"question": "?"})
    with pytest.raises(InputError, match=r"`images`, or a folder of frames in `video`"):
        read_samples(folder, 1)


class Sees(Stage[dropflow.StageOptions]):
    """Notes the videos of every call, and keeps the first frame of each."""

    seen: list[Any] = []  # noqa: RUF012  # shared on purpose

    @property
    def reads_videos(self) -> bool:
        return True

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        type(self).seen.append(call.videos)
        later = {frame for video in call.videos or () for frame in video[1:]}
        keeps = [torch.full((len(rows),), number not in later) for number, rows in enumerate(call.features)]
        return Encode(keep=tuple(keeps))


def test_a_comparison_states_the_videos_of_every_batch(tmp_path) -> None:
    write_clips(tmp_path, "test", 3)
    Image.new("RGB", (48, 48)).save(tmp_path / "still.png")
    lines = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    write(tmp_path, lines[0], lines[1] | {"image": "still.png"}, lines[2])
    samples = read_samples(tmp_path, 3)
    policy = dropflow.load_policy({"name": "sees", "stages": {"sees": {"use": Sees}}})
    Sees.seen.clear()
    answers = ask(start_clips(), build_clip_processor(), policy, samples, batch=2, max_new_tokens=1)
    assert Sees.seen == [(tuple(range(8)), tuple(range(9, 17))), (tuple(range(8)),)]
    assert answers.entry_visual_tokens == pytest.approx(36 * 4 / 3)


def test_the_control_of_a_policy_on_videos_is_drawn_per_video(tmp_path) -> None:
    rules = Rules(batch=2, max_new_tokens=1, timed=1, rounds=0)
    evs = dropflow.load_policy({"name": "evs", "stages": {"evs": {"use": "evs/retention", "rate": 0.75}}})
    samples = read_samples("clips", 2)
    comparing = Comparing(start_clips(), build_clip_processor(), samples, Finished(tmp_path), rules)
    member = comparing.member(evs)
    assert member.answers.entry_visual_tokens == member.controls[0].entry_visual_tokens == 72
    assert member.cost is not None
    assert member.cost.work.flops_counted == pytest.approx(member.cost.work.flops_formula, rel=0.01)
    assert any("random-72-seed-0" in path.name for path in tmp_path.iterdir())


def test_pictures_that_are_cut_into_tiles_are_refused() -> None:
    samples = read_samples("clips", 1)
    inputs = build_inputs(build_clip_processor(), [(samples[0].images(), samples[0].question)])
    with stating_videos(inputs, samples):
        pass
    inputs["pixel_values"] = inputs["pixel_values"].repeat(2, 1, 1, 1)
    with pytest.raises(InputError, match="one image for each of 8 frames and pictures, got 16"):
        stating_videos(inputs, samples)
    inputs["pixel_values"] = inputs["pixel_values"].flatten(1)
    with pytest.raises(InputError, match="got an unknown number of"):
        stating_videos(inputs, samples)
