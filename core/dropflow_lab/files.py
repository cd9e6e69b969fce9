"""Writes result files atomically, under names that stay in their folder."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

_LONGEST_NAME = 100


def check_writable(folder: Path) -> None:
    """Raise `InputError` if nothing can be written below `folder`; to be called before anything is measured."""
    from dropflow_lab.errors import InputError  # imports torch

    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise InputError(f"--out: {there} is not a writable folder; name another one")


def file_name(name: str) -> str:
    """Return `name` if it is a plain file name, otherwise a plain name made from it that no other name maps to.

    A plain name has up to 100 letters, digits, `.`, `_` and `-`, and does not begin with a dot.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[:_LONGEST_NAME]
    return name if plain == name and name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path` to write to; it replaces `path` atomically when the block ends.

    If the block raises, `path` is left unchanged. Creates the folder. A link, a device or a pipe is written to
    directly. Raises `OSError` naming `path`.
    """
    direct = path.is_symlink() or (path.exists() and not path.is_file())
    part = path if direct else path.with_name(f".{uuid4().hex}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if not direct:
            part.replace(path)
    except OSError as error:
        if error.filename not in (None, str(part)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if not direct:
            with suppress(NotADirectoryError):
                part.unlink(missing_ok=True)


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder inside `folder` to write files to; they are moved to `folder` when the block ends.

    They replace files of the same name one by one, the oldest first. If the block raises, `folder` is left unchanged.
    Raises `OSError` naming `folder`.
    """
    part = folder / ".part"
    shutil.rmtree(part, ignore_errors=True)  # left by a killed run
    try:
        with naming_what_cannot_be_written(folder):
            part.mkdir(parents=True)
            yield part
            for file in sorted(part.iterdir(), key=lambda file: file.stat().st_mtime_ns):
                file.chmod(0o644)  # safetensors writes its file with mode 0600
                file.replace(folder / file.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def naming_what_cannot_be_written(folder: Path) -> Iterator[None]:
    """Raise `OSError` naming `folder` if safetensors or torch cannot write their files, as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))  # safetensors
        if found:
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from error
        if "inline_container.cc" not in str(error):  # torch.save, which gives no details
            raise
        raise OSError(errno.EIO, "a file in it cannot be written; is the disk full?", str(folder)) from error


def write_text(path: Path, text: str) -> None:
    """Write a file atomically, creating its folder."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
