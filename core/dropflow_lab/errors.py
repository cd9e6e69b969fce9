"""Errors of the instruments, with the same base class as those of the engine."""

from __future__ import annotations

from dropflow.errors import DropflowError

_LONGEST = 200


class InputError(DropflowError, ValueError):
    """A file, folder or value given to an instrument cannot be used; nothing was run."""


def shortened(text: str) -> str:
    """Return `text` as one line of at most 200 characters, to be quoted in an error."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
