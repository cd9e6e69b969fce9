"""Questions about pictures and videos: from a folder with a JSONL file, or the embedded questions about digits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dropflow_lab.errors import InputError, shortened
from dropflow_lab.inputs.frames import frame_files
from dropflow_lab.inputs.images import is_file, read_image

if TYPE_CHECKING:
    from PIL.Image import Image

DIGITS, CLIPS = "digits", "clips"
"""Names of the embedded questions about pictures and about videos, in place of a folder."""
EMBEDDED = (DIGITS, CLIPS)
_SHOWN_FAULTS = 10


@dataclass(frozen=True)
class Picture:
    """A picture that is read or drawn only when it is opened."""

    name: str
    """Where it comes from; equal names mean the same picture."""
    open: Callable[[], Image]
    """Returns the picture as RGB."""


@dataclass(frozen=True)
class Sample:
    """One question about one or more pictures or videos."""

    pictures: tuple[Picture, ...]
    """Frames among them."""
    question: str
    answer: str | None = None
    """The right answer, if it is known."""
    kind: str | None = None
    """Kind of question, if the data distinguishes kinds."""
    where: str = ""
    """File and line that it comes from."""
    videos: tuple[tuple[int, ...], ...] = ()
    """For each video, the numbers of its frames among the pictures, in the order of time."""

    def images(self) -> list[Image]:
        """Open all pictures; raises `InputError` where one cannot be read."""
        return [picture.open() for picture in self.pictures]

    def is_answered_by(self, given: str) -> bool:
        """Whether `given` is the right answer; ignoring case, spacing and a full stop at the end."""
        return self.answer is not None and _plain(given) == _plain(self.answer)


class _Line(BaseModel):
    """One line of a data file; other fields are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)
    image: str | None = None
    images: list[str] = Field(default_factory=list)
    video: str | None = None
    videos: list[str] = Field(default_factory=list)
    question: str = Field(min_length=1)
    answer: str | None = None
    kind: str | None = None

    @property
    def names(self) -> list[str]:
        """Files of all images."""
        return [*([] if self.image is None else [self.image]), *self.images]

    @property
    def folders(self) -> list[str]:
        """Folders of all videos."""
        return [*([] if self.video is None else [self.video]), *self.videos]


def read_samples(source: str | Path, count: int, seed: int = 0) -> list[Sample]:
    """Return up to `count` samples of `source`, in order: a folder, or one of `EMBEDDED` for embedded test questions.

    A folder has one `data.jsonl` (or one other `.jsonl` file). Each line is an object with `question`, with `image` (a
    file name), `images` (several), `video` (a folder of frames) or `videos` (several), and, where known, `answer` and
    `kind`. Images precede videos in the prompt. Names are relative to the folder or to its `images/` or `videos/` and
    must not lead out of it; links are followed wherever they lead. `seed` selects the embedded questions. Pictures are
    opened later, sample by sample; of frames, names and sizes are read at once.

    Raises `InputError` naming file and line of each of the first faulty lines.
    """
    if str(source) in EMBEDDED:
        return list((_digits if str(source) == DIGITS else _clips)(count, seed))
    table = _table(Path(source))
    samples: list[Sample] = []
    faults: list[str] = []
    with table.open(encoding="utf-8") as lines:
        for number, text in islice(_filled(lines, table), count):
            try:
                samples.append(replace(_sample(table.parent, text), where=f"{table}:{number}"))
            except ValueError as error:
                faults.append(f"{table}:{number}: {error}")
    if faults:
        more = [f"{table}: {len(faults) - _SHOWN_FAULTS} more faulty lines"] if len(faults) > _SHOWN_FAULTS else []
        raise InputError("\n".join(faults[:_SHOWN_FAULTS] + more))
    if not samples:
        raise InputError(f"{table}: expected at least one line with a question, found none")
    return samples


def _table(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(
            f"{folder}: expected {' or '.join(map(repr, EMBEDDED))} or a folder with images/ and data.jsonl, "
            "found no such folder"
        )
    found = sorted(path for path in folder.glob("*.jsonl") if path.is_file())
    named = folder / "data.jsonl"
    if named in found:
        return named
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(f"{folder}: expected data.jsonl or one other .jsonl file, found {names}")
    return found[0]


def _filled(lines: Iterator[str], table: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1."""
    try:
        yield from ((number, text) for number, text in enumerate(lines, 1) if text.strip())
    except UnicodeDecodeError as error:
        raise InputError(f"{table}: expected UTF-8 text: {error}") from None


def _sample(folder: Path, text: str) -> Sample:
    try:
        line = _Line.model_validate(json.loads(text))
    except ValidationError as error:
        raise ValueError(
            "; ".join(_fault(fault["loc"], fault["msg"]) for fault in error.errors()[:_SHOWN_FAULTS])
        ) from None
    except (ValueError, RecursionError) as error:  # such as a number of 5,000 digits, or a depth of 10,000
        raise ValueError(f"expected a JSON object: {shortened(str(error))}") from None
    if not line.names and not line.folders:
        raise ValueError(
            "image: missing; name a file, or several in `images`, or a folder of frames in `video`, or several in "
            "`videos`"
        )
    pictures = [_picture(folder, name) for name in line.names]
    videos = []
    for name in line.folders:
        frames = _frames(folder, name)
        videos.append(tuple(range(len(pictures), len(pictures) + len(frames))))
        pictures += frames
    return Sample(tuple(pictures), line.question, line.answer, line.kind, videos=tuple(videos))


def _fault(where: tuple[int | str, ...], message: str) -> str:
    return f"{'.'.join(map(str, where)) or 'line'}: {message[0].lower()}{message[1:]}"


def _check_inside(folder: Path, name: str, what: str) -> None:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{what}: {shortened(repr(name))} leads out of {folder}; name a file inside, or a link to it")


def _frames(folder: Path, name: str) -> list[Picture]:
    _check_inside(folder, name, "video")
    places = (folder / name, folder / "videos" / name)
    found = next((place for place in places if place.is_dir()), places[0])
    return [Picture(str(path), partial(read_image, path)) for path in frame_files(found, name, folder)]


def _picture(folder: Path, name: str) -> Picture:
    _check_inside(folder, name, "image")
    for path in (folder / name, folder / "images" / name):
        if is_file(path):
            return Picture(str(path), partial(read_image, path))
    raise ValueError(f"image: no file {shortened(repr(name))} in {folder} or {folder / 'images'}")


def _digits(count: int, seed: int) -> Iterator[Sample]:
    from PIL.Image import fromarray

    from dropflow_lab.digits.data.dataset import question_at
    from dropflow_lab.digits.data.scenes import Scene, render

    def picture(index: int, scene: Scene) -> Picture:
        return Picture(f"{DIGITS}:test:{seed}:{index}", lambda: fromarray(render(scene)[0]))

    for index in range(count):
        scene, question = question_at("test", index, seed)
        yield Sample((picture(index, scene),), question.text, question.answer, question.kind)


def _clips(count: int, seed: int) -> Iterator[Sample]:
    from dropflow_lab.digits.data.clip_questions import clip_question_at
    from dropflow_lab.digits.data.clips import FRAMES, Clip, frame_of

    def frame(index: int, clip: Clip, number: int) -> Picture:
        return Picture(f"{CLIPS}:test:{seed}:{index}:{number}", lambda: frame_of(clip, number))

    for index in range(count):
        clip, question = clip_question_at("test", index, seed)
        frames = tuple(frame(index, clip, number) for number in range(FRAMES))
        asked = question.text, question.answer, question.kind
        yield Sample(frames, *asked, videos=(tuple(range(FRAMES)),))


def _plain(answer: str) -> str:
    return " ".join(answer.split()).rstrip(".").casefold()
