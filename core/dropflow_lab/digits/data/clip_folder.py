"""Folders of clips with questions and answers, for other commands to read."""

from __future__ import annotations

import json
from pathlib import Path

from rich.progress import track

from dropflow_lab.digits.data.clip_questions import clip_question_at
from dropflow_lab.digits.data.clips import FRAMES, frame_of
from dropflow_lab.files import replacing


def write_clips(path: Path, split: str, count: int, seed: int = 0) -> Path:
    """Write `videos/*/*.png` and `data.jsonl`, and return the path of the latter.

    Each line holds `video` (a folder, relative to `path`), `question`, `answer` and `kind`. An existing `data.jsonl` is
    replaced.
    """
    table = path / "data.jsonl"
    with replacing(table) as part, part.open("w", encoding="utf-8") as lines:
        for index in track(range(count), f"{split} videos"):
            clip, question = clip_question_at(split, index, seed)
            name = f"videos/{index:05d}"
            for frame in range(FRAMES):
                with replacing(path / name / f"{frame + 1}.png") as picture:
                    frame_of(clip, frame).save(picture)
            facts = {"question": question.text, "answer": question.answer, "kind": question.kind}
            lines.write(json.dumps({"video": name, **facts}) + "\n")
    return table
