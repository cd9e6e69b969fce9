"""Bodies of requests, read within limits, and bodies of responses, sent piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from dropflow_lab.serve.api_error import ApiError
from dropflow_lab.serve.limits import Limits
from dropflow_lab.serve.replies import encoded, event

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_LAST_WORDS = 1.0
"""Seconds in which a client must take the error that ends its request."""


class ClientLeft(Exception):
    """The client has closed its connection."""


def header(scope: Scope, name: str) -> str:
    """Return a header of the request, empty if it has none."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name.encode()), "")


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """Return the body of a request.

    Raises `ApiError` (413 or 408) if it is too long or comes too slowly, `ClientLeft` if the client leaves.
    """
    told = header(scope, "content-length")
    if told.isdecimal() and int(told[:20]) > limits.body_bytes:
        raise _too_long(limits)
    parts: list[bytes] = []
    length = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                parts.append(message.get("body", b""))
                length += len(parts[-1])
                if length > limits.body_bytes:
                    raise _too_long(limits)
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(
            408, "request_timeout", f"the request's body did not arrive within {limits.body_seconds:g} seconds"
        ) from None


def _too_long(limits: Limits) -> ApiError:
    return ApiError(
        413,
        "request_too_large",
        f"expected a body of up to {limits.body_bytes:,} bytes; send fewer or smaller pictures",
    )


class Response:
    """The response to one request: in one piece, as a stream of events, or as an error in either."""

    def __init__(self, send: Send) -> None:
        """`send` is that of ASGI."""
        self._send = send
        self.started = False
        """Whether the status has been sent."""

    async def whole(self, body: bytes, status: int = 200, kind: str = "application/json") -> None:
        """Send everything.

        The connection is closed only if the client does not send what it has announced: a client that is still sending
        would see a connection that is reset, and not the response. What it sends is read and dropped by uvicorn.
        """
        headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
        if status == 408:
            headers.append((b"connection", b"close"))
        if status == 503:
            headers.append((b"retry-after", b"1"))
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def events(self, data: bytes, *, last: bool = False) -> None:
        """Send events of a stream, which begins with the first."""
        if not self.started:
            self.started = True
            headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})

    async def error(self, error: ApiError) -> None:
        """Send an error, as an event if a stream has begun; a client that does not take it is left."""
        try:
            async with asyncio.timeout(_LAST_WORDS):
                if self.started:
                    await self.events(event(error.to_json()), last=True)
                else:
                    await self.whole(encoded(error.to_json()), error.status)
        except TimeoutError:
            return
