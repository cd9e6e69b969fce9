"""One chat request, from its arrival to the end of its answer."""

from __future__ import annotations

import asyncio
import time

from dropflow_lab.serve.api_error import ApiError
from dropflow_lab.serve.chat import ChatRequest
from dropflow_lab.serve.http import ClientLeft, Receive, Response, Scope, header, read_body
from dropflow_lab.serve.replies import DONE, Reply, usage_of
from dropflow_lab.serve.service import Events, Service
from dropflow_lab.serve.waiting import Finished, Piece, Told, Waiting

_LEFT = 499
"""Status under which a request is counted whose client left, as nginx does."""


class Exchange:
    """Reads a request, waits for its answer and sends it, whole or piece by piece; used once."""

    def __init__(self, service: Service, receive: Receive, response: Response) -> None:
        """`receive` gives the request's body, and says when its client leaves."""
        self._service, self._receive, self._response = service, receive, response
        self._arrived = time.monotonic()
        self._first: float | None = None
        self._model = ""

    async def run(self, scope: Scope) -> None:
        """Answer the request; raises `ApiError` if it fails, `ClientLeft` if nobody wants the answer any more."""
        status = 500
        try:
            await self._answer(scope)
            status = 200
        except ApiError as error:
            status = error.status
            raise
        except (ClientLeft, asyncio.CancelledError):
            status = _LEFT
            raise
        finally:
            self._service.metrics.ended(self._model, status)

    async def _answer(self, scope: Scope) -> None:
        service, events = self._service, Events()
        owner = service.keys.owner(header(scope, "authorization"))
        with service.inside():
            try:
                async with asyncio.timeout(service.limits.seconds):
                    body = await read_body(scope, self._receive, service.limits)
                    request, waiting = await service.read(body, owner, events)
                    del body
                    self._model = service.names.full(waiting.policy)
                    watch = asyncio.create_task(self._until_left(events))
                    try:
                        with service.waiting(waiting):
                            end = await self._hand_on(request, waiting, events)
                    finally:
                        watch.cancel()
            except TimeoutError:
                raise ApiError(
                    504, "timeout", f"the answer was not finished within {service.limits.seconds:g} seconds"
                ) from None
            service.metrics.answered(self._model, self._arrived, self._first, waiting.prompt.tokens, end.tokens)

    async def _until_left(self, events: Events) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        events.put_nowait(None)

    async def _hand_on(self, request: ChatRequest, waiting: Waiting, events: Events) -> Finished:
        """Send what the request is told, until its end."""
        reply, response, texts = Reply(self._model), self._response, list[str]()
        while isinstance(told := await _next(events), Piece):
            self._first = self._first or time.monotonic()
            if request.stream:
                await response.events((b"" if response.started else reply.opening()) + reply.piece(told.text))
            else:
                texts.append(told.text)
        if isinstance(told, ApiError):
            raise told
        usage = usage_of(waiting.prompt.tokens, told.tokens)
        if request.stream:
            opening = b"" if response.started else reply.opening()
            asked = reply.usage(usage) if request.stream_options.include_usage else b""
            await response.events(opening + reply.closing(told.reason) + asked + DONE, last=True)
        else:
            await response.whole(reply.whole("".join(texts), told.reason, usage))
        return told


async def _next(events: Events) -> Told:
    told = await events.get()
    if told is None:
        raise ClientLeft
    return told
