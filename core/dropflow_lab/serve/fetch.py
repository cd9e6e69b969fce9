"""Fetches pictures from the hosts that the server's owner allows; redirects are not followed."""

from __future__ import annotations

import time
from collections.abc import Collection
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, build_opener

from dropflow.errors import escaped
from dropflow_lab.serve.api_error import ApiError

_SECONDS = 10.0
_PIECE = 2**16


class _Staying(HTTPRedirectHandler):
    """Follows no redirect, which could lead to a host that is not allowed."""

    def redirect_request(self, *_: Any) -> None:
        """Return no further request, so that the redirect itself is an error."""


def fetch(url: str, hosts: Collection[str], most_bytes: int) -> bytes:
    """Return what is at a URL, if its host (or host and port) is in `hosts`.

    Raises `ApiError` (400) if it is not, if there is no answer within 10 seconds, or if it is longer than `most_bytes`.
    """
    try:
        parts = urlsplit(url)
        names = {parts.hostname or "", f"{parts.hostname}:{parts.port}"}
    except ValueError:
        raise ApiError(400, "invalid_image", f"not a URL: {escaped(url)}") from None
    if parts.scheme not in ("http", "https") or not names & set(hosts) or parts.username is not None:
        raise ApiError(
            400,
            "url_not_allowed",
            f"this server does not fetch pictures from {escaped(parts.netloc or url)}; send the picture itself, as "
            "data:image/png;base64,... or as an uploaded file",
        )
    opener = build_opener(ProxyHandler({}), _Staying())
    try:
        with opener.open(url, timeout=_SECONDS) as answer:
            data, end = b"", time.monotonic() + _SECONDS
            while len(data) <= most_bytes and (more := answer.read1(_PIECE)):
                data += more
                if time.monotonic() > end:
                    raise TimeoutError(f"no whole answer within {_SECONDS:g} seconds")
    except (OSError, HTTPException, ValueError) as error:  # URLError is an OSError
        if isinstance(error, HTTPError):
            error.close()
        raise ApiError(400, "fetch_failed", f"{escaped(url)} cannot be fetched: {escaped(error)}") from None
    if len(data) > most_bytes:
        raise ApiError(400, "fetch_failed", f"{escaped(url)} is longer than {most_bytes:,} bytes")
    return data
