"""Errors of the instruments, under the same root as those of the engine."""

from __future__ import annotations

from dropflow.errors import DropflowError


class InputError(DropflowError, ValueError):
    """A file, folder or value given to an instrument cannot be used; nothing was run."""
