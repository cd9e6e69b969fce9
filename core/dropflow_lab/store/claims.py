"""Work that several processes share: whoever locks a file does the piece, and the others do something else meanwhile.

The locks are those of the operating system (`flock`), so that a killed process loses its own at once, also across
machines that share a file system with such locks (NFS 4, Lustre mounted with `flock`, most others).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from dropflow_lab.errors import InputError

T = TypeVar("T")
_SHORTEST, _LONGEST = 0.05, 2.0
"""Seconds to wait before asking again, when other processes are at all that is left."""


class Taken(Exception):
    """Another process is doing this piece of work."""


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold the lock file `path` while the block runs, and remove it if the block ends without an error.

    Raises `Taken` if another process holds it, and `InputError` where the file system has no locks. The block must have
    stored its result before it ends, and read what is stored when it begins: a process that opened the file just before
    it was removed then finds the result.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise Taken(str(path)) from None
    except NotImplementedError:
        raise InputError(
            f"{path.parent}: expected a file system with file locks, which several processes need to share work; name "
            "another folder, or mount this one with locks (Lustre: `-o flock`)"
        ) from None
    try:
        yield
        with suppress(OSError):  # Windows removes no open file
            path.unlink()
    finally:
        lock.release()


def in_order(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Run all jobs and yield their results in order, each as soon as it and those before it are known.

    A job that raises `Taken`, because another process is at a part of it, is put off until the others have been tried.
    """
    left, done, next_up = dict(enumerate(jobs)), dict[int, T](), 0
    pause = _SHORTEST
    while left:
        before = len(left)
        for number, job in list(left.items()):
            try:
                done[number] = job()
            except Taken:
                continue
            del left[number]
            while next_up in done:
                yield done.pop(next_up)
                next_up += 1
        pause = _SHORTEST if len(left) < before else min(2 * pause, _LONGEST)
        if left:
            time.sleep(pause)
