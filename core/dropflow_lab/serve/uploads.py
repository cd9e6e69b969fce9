"""Files that clients have uploaded, in memory for a while; each is found only by its id and its owner."""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import dataclass
from typing import Any

from dropflow_lab.serve.api_error import ApiError

_LONGEST_TEXT = 255
_ENTRY = 1024
"""Bytes counted for what is held of a file beside its content, so that empty files are bounded, too."""


@dataclass(frozen=True)
class Upload:
    """An uploaded file."""

    id: str
    owner: str
    """Digest of the API key that it was uploaded with; empty on a server without keys."""
    name: str
    purpose: str
    data: bytes
    created: float
    """Seconds since the epoch."""

    def to_json(self) -> dict[str, Any]:
        """Return what the API says about the file."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": len(self.data),
            "created_at": int(self.created),
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


class Uploads:
    """The files of all clients; may be used from several threads.

    Ids hold 128 random bits, and there is no list of them: a client can use what it has uploaded, and nothing else.
    """

    def __init__(self, most_bytes: int, seconds: float) -> None:
        """`most_bytes` bounds all files together, each with 1,024 bytes more; they are dropped after `seconds`."""
        self._most, self._seconds = most_bytes, seconds
        self._files: dict[str, Upload] = {}
        self._lock = threading.Lock()

    def add(self, owner: str, name: str, purpose: str, data: bytes) -> Upload:
        """Keep a file; raises `ApiError` (507) if there is no room for it, (400) for a name or purpose too long."""
        for param, text in (("file", name), ("purpose", purpose)):
            if len(text) > _LONGEST_TEXT:
                raise ApiError(
                    400,
                    "invalid_form",
                    f"{param}: expected a name of up to {_LONGEST_TEXT} characters, got {len(text):,}",
                    param,
                )
        with self._lock:
            self._drop_old()
            if sum(len(file.data) + _ENTRY for file in self._files.values()) + len(data) + _ENTRY > self._most:
                raise ApiError(
                    507,
                    "no_room",
                    f"uploaded files may hold {self._most:,} bytes together, and there is no room for {len(data):,} "
                    "more; delete some, or send the picture in the message",
                )
            file = Upload(f"file-{secrets.token_hex(16)}", owner, name, purpose, data, time.time())
            self._files[file.id] = file
            return file

    def get(self, owner: str, name: str) -> Upload:
        """Return the file of this id; raises `ApiError` (404) if the owner has none."""
        with self._lock:
            return self._found(owner, name)

    def delete(self, owner: str, name: str) -> None:
        """Drop the file of this id; raises `ApiError` (404) if the owner has none."""
        with self._lock:
            del self._files[self._found(owner, name).id]

    def _found(self, owner: str, name: str) -> Upload:
        self._drop_old()
        file = self._files.get(name)
        if file is None or file.owner != owner:
            raise ApiError(404, "no_such_file", "no file of this id was uploaded with this API key, or it has expired")
        return file

    def _drop_old(self) -> None:
        oldest = time.time() - self._seconds
        for file in [file for file in self._files.values() if file.created < oldest]:
            del self._files[file.id]
