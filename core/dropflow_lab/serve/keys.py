"""API keys: who may ask, and whose files are whose."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from pathlib import Path

from dropflow_lab.errors import InputError
from dropflow_lab.serve.api_error import ApiError

VARIABLE = "DROPFLOW_API_KEY"
"""Environment variable that may hold a key."""


class Keys:
    """The keys that a server accepts; none at all lets everybody in."""

    def __init__(self, keys: list[str]) -> None:
        """Only digests are kept."""
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def read(cls, file: Path | None, environment: Mapping[str, str] = os.environ) -> Keys:
        """Read one key per line of a file, and the one in the environment; `#` begins a comment.

        Raises `InputError` for a file or a variable without keys, and `OSError` for one that cannot be read.
        """
        own = environment.get(VARIABLE, "")
        if own and not own.strip():
            raise InputError(f"{VARIABLE}: expected an API key, got only spaces; unset it to serve without a key")
        keys = [own.strip()] if own else []
        if file is not None:
            try:
                lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
            except UnicodeDecodeError:
                raise InputError(f"{file}: expected UTF-8 text with one API key per line") from None
            found = [line for line in lines if line]
            if not found:
                raise InputError(f"{file}: expected one API key per line, found none")
            keys += found
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, authorization: str) -> str:
        """Return the digest of the key in an `Authorization` header; empty on a server without keys.

        Raises `ApiError` (401) if it is not one of the server's.
        """
        if not self._digests:
            return ""
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        known = [hmac.compare_digest(digest, one) for one in self._digests]  # all of them, to take the same time
        if scheme.lower() != "bearer" or not any(known):
            raise ApiError(
                401, "invalid_api_key", "expected `Authorization: Bearer KEY` with one of this server's API keys"
            )
        return digest


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
