"""What the server allows: sizes, numbers and seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a server; a request beyond one of them is refused with a status of its own."""

    batch: int = 8
    """Most requests that the model answers at once."""
    wait: float = 0.01
    """Seconds that the first request of a batch waits for others, while others are being prepared."""
    queue: int = 64
    """Most requests inside the server, in whatever state; 503 beyond."""
    seconds: float = 120.0
    """Seconds from a request's arrival to the end of its answer; 504 beyond."""
    body_seconds: float = 30.0
    """Seconds in which a request's body must arrive; 408 beyond."""
    body_bytes: int = 20 * 2**20
    """Bytes of a request's body; 413 beyond."""
    images: int = 8
    """Pictures of one request; 400 beyond."""
    pixels: int = 20_000_000
    """Pixels of one picture; 400 beyond."""
    answer_tokens: int = 1024
    """Tokens of one answer; 400 beyond."""
    upload_bytes: int = 256 * 2**20
    """Bytes of all uploaded files together, which are held in memory; 507 beyond."""
    prefix_bytes: int = 256 * 2**20
    """Bytes of all prefixes together, which requests about the same pictures begin with; 0 makes none."""
    upload_seconds: float = 3600.0
    """Seconds that an uploaded file is kept."""
    grace: float = 30.0
    """Seconds in which requests may finish when the server is stopped; 503 beyond."""
    hosts: frozenset[str] = frozenset()
    """Hosts, `name` or `name:port`, that pictures may be fetched from."""
