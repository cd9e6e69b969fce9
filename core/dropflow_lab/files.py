"""Writes result files."""

from __future__ import annotations

import os
from pathlib import Path


def check_writable(folder: Path) -> None:
    """Raise `InputError` where nothing can be written below `folder`, before anything is measured for it."""
    from dropflow_lab.errors import InputError  # imports torch

    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise InputError(f"--out: {there} is no folder that can be written to; name another one")


def write_text(path: Path, text: str) -> None:
    """Write a file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
