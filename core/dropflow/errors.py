"""Every error Dropflow raises: they share one root, and each also derives from the builtin a caller would expect."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

LONGEST = 200
"""Most characters of a value that a message quotes; a longer one is cut."""
MOST_NAMES = 40
"""Valid names that a message lists at most."""
MOST_LINES = 20
"""Most faults that one message lists."""


class DropflowError(Exception):
    """Root of all errors raised on purpose by Dropflow."""


class PolicyError(DropflowError, ValueError):
    """A policy cannot be run as written; the message starts with the path of the wrong entry."""


class UnknownName(DropflowError, LookupError):
    """A stage, adapter or policy name is not registered."""


class DuplicateName(DropflowError, ValueError):
    """Two installed packages registered the same name."""


class BrokenPlugin(DropflowError, ImportError):
    """An installed package registered a name that cannot be imported."""


class UnsupportedModel(DropflowError, TypeError):
    """The model, its cache or its attention is not supported, so nothing was run."""


class UnsupportedCall(DropflowError, ValueError):
    """The arguments of this call are not supported under the attached policy, so nothing was run."""


class MissingImage(DropflowError, ValueError):
    """The prompt has image placeholders but no image was given."""


class DecisionError(DropflowError, ValueError):
    """A stage returned a decision that does not fit the payload it was given."""


class MissingPackage(DropflowError, ImportError):
    """An optional package that this call needs is not installed."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Say which valid names are closest to `name`, or list the first of them when none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name[:LONGEST], names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(c) for c in close)}?"
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"valid: {', '.join(names[:MOST_NAMES])}{more}" if names else "none is registered"


def escaped(text: object, most: int = LONGEST) -> str:
    """Text as one line of at most `most` characters: line breaks and control characters are written as escapes."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[: 2 * most])
    return line if len(line) <= most else f"{line[: most - 40]} ... ({len(str(text)):,} characters)"


def quoted(value: object) -> str:
    """A value as Python shows it, on one line of bounded length, for messages."""
    return escaped(_shown.repr(value))


def listed(faults: list[str]) -> str:
    """A line for each fault, and one that counts those beyond `MOST_LINES`."""
    more = [f"and {len(faults) - MOST_LINES} more"] if len(faults) > MOST_LINES else []
    return "\n".join([*faults[:MOST_LINES], *more])


class _Shown(reprlib.Repr):
    """`repr` with limits, for deep, long and self-referential values and for integers too long for Python to write."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, 120, 120
        self.maxdict = self.maxlist = self.maxtuple = 8

    def repr_int(self, value: int, level: int) -> str:  # noqa: ARG002  # the base class names it
        """Give the size of an integer that would fill the line."""
        bits = value.bit_length()
        return f"an integer of {bits:,} bits" if bits > 128 else repr(value)


_shown = _Shown()
