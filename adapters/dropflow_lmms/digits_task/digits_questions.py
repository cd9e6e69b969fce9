"""Pictures and scores of the task in `dropflow_digits.yaml`."""

from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).parent
"""Folder with the pictures, beside a copy of this file."""


def pictures(doc: dict[str, Any]) -> list[Image.Image]:
    """Return the pictures of a question, which go before it."""
    with Image.open(HERE / doc["image"]) as picture:
        return [picture.convert("RGB")]


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return 1 for the right answer; ignoring case, spacing and a full stop at the end, as `dropflow compare` does."""
    return {"exact_match": float(_plain(results[0]) == _plain(doc["answer"]))}


def _plain(answer: str) -> str:
    return " ".join(answer.split()).rstrip(".").casefold()
