"""Errors of the instruments, under the same root as those of the engine."""

from __future__ import annotations

from dropflow.errors import DropflowError

_LONGEST = 200


class InputError(DropflowError, ValueError):
    """A file, folder or value given to an instrument cannot be used; nothing was run."""


def shortened(text: str) -> str:
    """Return what is to be quoted in an error, as one line of at most 200 characters."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
