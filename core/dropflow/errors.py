"""Every error Dropflow raises: one root, and each kind keeps the builtin a caller would expect."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DropflowError(Exception):
    """Root of all errors raised on purpose by Dropflow."""


class PolicyError(DropflowError, ValueError):
    """A policy does not say something that can be run; the message starts with the path of the wrong entry."""


class UnknownName(DropflowError, LookupError):
    """A stage, adapter or policy name is not registered."""


class DuplicateName(DropflowError, ValueError):
    """Two installed packages registered the same name."""


class BrokenPlugin(DropflowError, ImportError):
    """An installed package registered a name that cannot be imported."""


class UnsupportedModel(DropflowError, TypeError):
    """The model, its cache or its attention cannot be served correctly, so nothing was run."""


class UnsupportedCall(DropflowError, ValueError):
    """The arguments of this call cannot be served correctly under the attached policy, so nothing was run."""


class MissingImage(DropflowError, ValueError):
    """The prompt has image placeholders but no image was given."""


class DecisionError(DropflowError, ValueError):
    """A stage returned a decision that does not fit the payload it was given."""


class MissingPackage(DropflowError, ImportError):
    """An optional package that this call needs is not installed."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Say which valid names are closest to `name`, or list them all when none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(c) for c in close)}?"
    return f"valid: {', '.join(names)}" if names else "none is registered"
